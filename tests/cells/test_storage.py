"""Stores on S3 read as from a disk, through a server that fails; Census builds are pinned."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from stores import make_store, make_vocab

from tftrain.cells.plan import OrderConfig, Plan
from tftrain.cells.source import HoldoutConfig, QcConfig, SourceConfig, close_experiments, open_sources
from tftrain.cells.storage import CensusConfig, resolved
from tftrain.cells.stream import StreamConfig, stream_steps
from tftrain.errors import CellsError, RecipeError

VOCAB = make_vocab([f"G{gene}" for gene in range(40)])
N_CELLS = 300
BUILD = "census/2025-01-30/soma/census_data/homo_sapiens"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """URL of a local S3 server, and a folder whose store `BUILD` is in its bucket `cells`."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.1)
    folder = tmp_path_factory.mktemp("s3")
    (folder / BUILD).parent.mkdir(parents=True)
    make_store(folder / BUILD, n_cells=N_CELLS)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    client.create_bucket(Bucket="cells", ACL="public-read")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(
                Bucket="cells", Key=str(path.relative_to(folder)), Body=path.read_bytes(), ACL="public-read"
            )
    yield url, folder
    close_experiments()
    server.kill()
    server.wait()


KINDS = ("500", "dropped", "cut", "503", "stalled")


class Faults(ThreadingHTTPServer):
    """A proxy before the S3 server that spoils every `every`-th request that is new to it: by a 500, a dropped
    connection, an answer cut in the middle, a 503, a stall, in turn. The same request is served when it comes again.
    """

    daemon_threads = True

    def __init__(self, target: str, every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.target, self.every = target.removeprefix("http://"), every
        self.known: set[tuple] = set()
        self.lock = threading.Lock()
        self.seen: Counter = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        server: Faults = self.server  # type: ignore[assignment]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = (self.command, self.path, self.headers.get("Range"), body)
        with server.lock:
            is_new = request not in server.known
            server.known.add(request)
            turn, rest = divmod(len(server.known), server.every)
            kind = "fine" if rest or not is_new else KINDS[turn % len(KINDS)]
            server.seen[kind] += 1
        if kind == "stalled":
            time.sleep(1.0)
        if kind in ("500", "503"):
            self.send_response(int(kind))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == "dropped":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        upstream = http.client.HTTPConnection(server.target, timeout=30)
        headers = dict(self.headers.items())
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if kind == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format, *args):
        pass


def sequence(config: SourceConfig):
    """Every cell of an epoch with its genes and counts, in order."""
    sources = open_sources(
        [config], VOCAB, qc=QcConfig(0, 0), holdout=HoldoutConfig(values=["d3"]), obs_columns=["assay"]
    )
    plan = Plan((sources[0].plan_source,), 7, OrderConfig(4, 10, 40), 24)
    local = StreamConfig(backend="local")
    return [
        (cursor, cells.joinid_C.tolist(), cells.gene_N.tolist(), cells.count_N.tolist(), cells.obs["assay"].tolist())
        for cells, cursor in stream_steps(plan, sources, stop_cursor=plan.epoch_start(1), config=local)
    ]


@pytest.mark.timeout(200)
def test_a_store_on_s3_streams_as_from_a_disk_though_the_server_fails(s3):
    url, folder = s3
    on_disk = sequence(SourceConfig(str(folder / BUILD), "s"))
    assert sum(len(step[1]) for step in on_disk) == N_CELLS - 30
    uri = f"s3://cells/{BUILD}"
    assert sequence(SourceConfig(uri, "s", endpoint=url, region="us-east-1")) == on_disk
    faults = Faults(url, every=7)
    assert sequence(SourceConfig(uri, "s", endpoint=faults.url, region="us-east-1")) == on_disk
    faults.shutdown()
    assert all(faults.seen[kind] for kind in KINDS), faults.seen


def test_a_public_bucket_is_asked_without_signing(s3):
    url, _ = s3
    settings = dict(SourceConfig("s3://cells/x", "s", endpoint=url, anonymous=True).place.settings)
    assert settings["vfs.s3.no_sign_request"] == "true"
    assert settings["vfs.s3.endpoint_override"] == url.removeprefix("http://")
    uri = f"s3://cells/{BUILD}"
    anonymous = SourceConfig(uri, "s", endpoint=url, region="us-east-1", anonymous=True)
    assert open_sources([anonymous], VOCAB, qc=QcConfig(0, 0), holdout=HoldoutConfig(fraction=0))[0].n_cells == N_CELLS


def test_a_bucket_without_the_store_is_named(s3):
    url, _ = s3
    with pytest.raises(CellsError, match=r"s3://cells/nothing: no SOMA experiment .* region, endpoint and credentials"):
        open_sources([SourceConfig("s3://cells/nothing", "s", endpoint=url, region="us-east-1")], VOCAB)


RELEASES = {
    "stable": "2025-01-30",
    "latest": "weekly",
    "weekly": "2025-11-08",
    "2025-01-30": {"release_build": "2025-01-30"},
    "2025-11-08": {"release_date": None, "soma": {}},
}


@pytest.fixture
def directory():
    """URL of a release directory on a local server."""

    class Directory(BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps(RELEASES).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Directory)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/release.json"
    server.shutdown()


@pytest.mark.parametrize(
    ("version", "expected"), [("2023-12-15", "2023-12-15"), ("stable", "2025-01-30"), ("latest", "2025-11-08")]
)
def test_a_census_build_is_pinned(directory, version, expected):
    source = resolved(SourceConfig(census=CensusConfig(version, "mus_musculus", directory), weight=0.5))
    assert source.uri == (
        f"s3://cellxgene-census-public-us-west-2/cell-census/{expected}/soma/census_data/mus_musculus"
    )
    assert (source.species, source.weight, source.anonymous, source.region) == ("mus_musculus", 0.5, True, "us-west-2")
    assert source.census is not None
    assert source.census.version == expected
    assert resolved(source) == source


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SourceConfig(), RecipeError, "neither uri nor census"),
        (lambda: SourceConfig("a.soma"), RecipeError, r"a.soma has no species"),
        (
            lambda: SourceConfig("s3://a", "s", endpoint="minio:9000"),
            RecipeError,
            r"must be a URL such as http://minio",
        ),
        (
            lambda: CensusConfig("newest", "homo_sapiens"),
            RecipeError,
            r"census.version is 'newest'; it must be the date",
        ),
        (lambda: CensusConfig("stable", "Homo sapiens"), RecipeError, r"census.organism is 'Homo sapiens'"),
        (
            lambda: resolved(SourceConfig(census=CensusConfig("stable", "homo_sapiens", "http://127.0.0.1:9/x"))),
            CellsError,
            r"'stable' cannot be looked up at http://127.0.0.1:9/x .* give the date of a build",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""Where a store lies: a local folder, `s3://` with or without credentials, or a pinned build of the CELLxGENE Census.

In: a SourceConfig. Out: its uri with the Census resolved, and open experiments, one handle a process. Credentials never
stand in a recipe: they come from the environment (AWS_ACCESS_KEY_ID, ...), an AWS profile or the machine's role.

The Census keeps one experiment a species at `<build>/soma/census_data/<organism>`, whose obs has raw_sum, nnz,
is_primary_data, donor_id and assay, with counts in ms/RNA/X/raw and Ensembl ids in ms/RNA/var's feature_id.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import tiledbsoma

from tftrain.errors import CellsError, RecipeError

log = logging.getLogger(__name__)
T = TypeVar("T")

CENSUS_BUCKET, CENSUS_REGION = "s3://cellxgene-census-public-us-west-2/cell-census", "us-west-2"
_DIRECTORY = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
_TILEDB_CONFIG = {
    # 64 MB a column and two threads of each kind keep a reader small; more of either gained nothing when measured.
    "soma.init_buffer_bytes": str(64 << 20),
    "sm.compute_concurrency_level": "2",
    "sm.io_concurrency_level": "2",
    "sm.mem.total_budget": str(1 << 30),
}
_S3_CONFIG = {
    # A stalled connection is given up and asked for again rather than waited for.
    "vfs.s3.connect_timeout_ms": "5000",
    "vfs.s3.request_timeout_ms": "20000",
    "vfs.s3.connect_max_tries": "8",
    "vfs.s3.connect_scale_factor": "100",
}


@dataclass(frozen=True)
class CensusConfig:
    """A build of the CELLxGENE Census in its public bucket."""

    version: str
    """Date of a build, such as 2025-01-30; `stable` and `latest` are looked up when a run begins, and recorded."""
    organism: str
    """Name of its experiment: homo_sapiens, mus_musculus, ..."""
    directory: str = _DIRECTORY
    """JSON of all releases; only asked for `stable` and `latest`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}|stable|latest", self.version):
            raise RecipeError(
                f"census.version is {self.version!r}; it must be the date of a build, such as 2025-01-30, or stable or "
                "latest"
            )
        if not re.fullmatch(r"[a-z0-9_]+", self.organism):
            raise RecipeError(f"census.organism is {self.organism!r}; it must be a name such as homo_sapiens")


@dataclass(frozen=True)
class SourceConfig:
    """One store. `uri` or `census` says where it lies."""

    uri: str = ""
    """Folder of a SOMA experiment, or its `s3://` location."""
    species: str = ""
    """Species of its cells, as the recipe's protein tables name it; none: the Census's organism."""
    weight: float = 1.0
    """Passes over its cells in an epoch: 2 shows every cell twice, 0.1 shows another tenth of them in each epoch."""
    census: CensusConfig | None = None
    region: str | None = None
    """Of an `s3://` store; none: AWS_REGION, or else us-east-1."""
    endpoint: str | None = None
    """URL of another S3 server than Amazon's, such as http://minio:9000."""
    anonymous: bool = False
    """Ask a public bucket without signing."""

    def __post_init__(self) -> None:
        if not self.uri and self.census is None:
            raise RecipeError("a source has neither uri nor census; give the place of its store")
        if not self.species:
            if self.census is None:
                raise RecipeError(f"source {self.uri} has no species; name it as its protein table does")
            object.__setattr__(self, "species", self.census.organism)
        if self.endpoint is not None and not re.match(r"https?://[^/]+$", self.endpoint):
            raise RecipeError(f"endpoint is {self.endpoint!r}; it must be a URL such as http://minio:9000")

    @property
    def place(self) -> Place:
        """Where the store is opened. Raises RecipeError for a Census alias: resolve it first (`resolved`)."""
        settings: dict[str, str] = {}
        if self.uri.startswith("s3://"):
            settings |= _S3_CONFIG
            if region := self.region or os.environ.get("AWS_REGION"):
                settings["vfs.s3.region"] = region
            if self.endpoint:
                scheme, _, host = self.endpoint.partition("://")
                settings |= {"vfs.s3.scheme": scheme, "vfs.s3.endpoint_override": host}
                settings["vfs.s3.use_virtual_addressing"] = "false"
            if self.anonymous:
                settings["vfs.s3.no_sign_request"] = "true"
        return Place(self.uri, tuple(settings.items()))


@dataclass(frozen=True)
class Place:
    """A store's uri and what TileDB must know to reach it. Holds no credentials; pickles."""

    uri: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def is_remote(self) -> bool:
        """Whether reads may fail for reasons that pass."""
        return "://" in self.uri and not self.uri.startswith("file://")


def resolved(config: SourceConfig) -> SourceConfig:
    """The same source with the Census build pinned and its uri filled in; asks the network only for an alias.

    Raises CellsError where the release directory cannot be read or does not know the alias.
    """
    census = config.census
    if census is None:
        return config
    if census.version in ("stable", "latest"):
        census = dataclasses.replace(census, version=_version_of(census))
    if config.uri:
        # Pinned before, in a resolved recipe: an alias that has moved since shows as another version.
        return dataclasses.replace(config, census=census)
    return dataclasses.replace(
        config,
        census=census,
        uri=f"{CENSUS_BUCKET}/{census.version}/soma/census_data/{census.organism}",
        region=config.region or CENSUS_REGION,
        anonymous=True,
    )


def _version_of(census: CensusConfig) -> str:
    try:
        with urllib.request.urlopen(census.directory, timeout=30) as answer:
            releases = json.load(answer)
    except (OSError, ValueError) as error:
        raise CellsError(
            f"census.version {census.version!r} cannot be looked up at {census.directory} ({error}); "
            "give the date of a build, such as 2025-01-30"
        ) from error
    found, seen = releases.get(census.version), 0
    while isinstance(found, str) and seen < 4:  # an alias names another entry
        name, found, seen = found, releases.get(found), seen + 1
    version = found.get("release_build") or name if isinstance(found, dict) else None
    if not isinstance(version, str):
        raise CellsError(f"{census.directory} has no release {census.version!r}; it has {', '.join(releases)}")
    return version


_open: dict[tuple[int, Place], tiledbsoma.Experiment] = {}


def experiment(place: Place | str) -> tiledbsoma.Experiment:
    """The open experiment at `place`, one handle for each process: a handle neither pickles nor survives a fork.

    Raises CellsError where there is none.
    """
    place = Place(place) if isinstance(place, str) else place
    key = (os.getpid(), place)
    if key not in _open:
        context = tiledbsoma.SOMATileDBContext(tiledb_config={**_TILEDB_CONFIG, **dict(place.settings)})
        try:
            _open[key] = tiledbsoma.Experiment.open(place.uri, context=context)
        except (tiledbsoma.SOMAError, tiledbsoma.DoesNotExistError, TypeError, RuntimeError) as error:
            hint = (
                "check bucket and path, region, endpoint and credentials (AWS_PROFILE or AWS_ACCESS_KEY_ID in the "
                "environment of every worker; anonymous: true for a public bucket)"
                if place.is_remote
                else "give the folder of one species' experiment (`tftrain-data build` makes one from h5ad files)"
            )
            raise CellsError(
                f"{place.uri}: no SOMA experiment can be opened there ({first_line(error)}); {hint}"
            ) from error
    return _open[key]


_TRIES, _PAUSE_S = 5, 0.5
"""Of a read from a remote store that failed, beside the tries that TileDB makes; the pause doubles."""
READ_ERRORS = (tiledbsoma.SOMAError, RuntimeError, OSError)


def read_again(place: Place, read: Callable[[tiledbsoma.Experiment], T]) -> T:
    """`read(experiment)`; of a remote store done again from its beginning, on a new handle, where it failed.

    `read` must return all of its result at once, so that nothing is lost or comes twice. Raises what the last try did.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return read(experiment(place))
        except (*READ_ERRORS, CellsError) as error:
            if not place.is_remote or attempt == _TRIES:
                raise
            log.info("%s: read again: %s", place.uri, first_line(error))
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
            close_experiments([place])
    raise AssertionError("unreachable")


def first_line(error: BaseException) -> str:
    """The error's message without its trace."""
    return str(error).strip().split("\n")[0]


def close_experiments(places: Sequence[Place] | None = None) -> None:
    """Forgets this process's handles (of `places`, or all), so that the next use sees a store as it is then."""
    for key in [key for key in _open if key[0] == os.getpid() and (places is None or key[1] in places)]:
        _open.pop(key).close()

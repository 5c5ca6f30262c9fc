"""A folder on a local disk or any filesystem that pyarrow knows (`s3://`, `gs://`, `hdfs://`), in one set of words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from tftrain.errors import CheckpointError


@dataclass(frozen=True)
class Folder:
    """A place for files; it need not exist yet."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    """As the user wrote it, for messages."""

    @staticmethod
    def at(uri: str | os.PathLike) -> Folder:
        """The folder of a local path or a `scheme://` location.

        Raises CheckpointError where pyarrow cannot reach it.
        """
        text = os.fspath(uri)
        if "://" not in text:
            return Folder(pafs.LocalFileSystem(), str(Path(text).expanduser().absolute()), text)
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot use {text!r} as a folder: {error}") from None
        return Folder(filesystem, path, text)

    @property
    def local(self) -> Path | None:
        """The path, where the folder lies on this machine's disks (or a mounted share)."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> Folder:
        base, mark, query = self.uri.partition("?")
        return Folder(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{base.rstrip('/')}/{name}{mark}{query}")

    def exists(self, name: str = "") -> bool:
        """Whether the folder, or a file or folder `name` in it, exists."""
        path = f"{self.path}/{name}" if name else self.path
        return self.filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """What lies directly in the folder, sorted; nothing where it does not exist."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the folder, by path relative to it."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        files = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        return {info.path[len(self.path.rstrip("/")) + 1 :]: info.size for info in sorted(files, key=lambda i: i.path)}

    def make(self) -> None:
        """Creates the folder and those above it."""
        self.filesystem.create_dir(self.path, recursive=True)

    def read_text(self, name: str) -> str:
        """The text of one file. Raises FileNotFoundError."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
            return file.read().decode()

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole: a reader sees the old text or the new one."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes one file whole: a reader sees the old content or the new one."""
        self.make()
        if self.local is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
                file.write(content)
            return
        part = self.local / f".{name}.part"
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.local / name)

    def remove(self, name: str = "") -> None:
        """Deletes the folder, or one file in it, where it exists."""
        if name:
            if self.exists(name):
                self.filesystem.delete_file(f"{self.path}/{name}")
        elif self.exists():
            self.filesystem.delete_dir(self.path)

    def upload(self, source: Path) -> None:
        """Copies all files below the local folder `source` into this one."""
        self.make()
        pafs.copy_files(
            str(source), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
        )

    def download(self, target: Path) -> None:
        """Copies all files below this folder into the local folder `target`."""
        target.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            self.path, str(target), source_filesystem=self.filesystem, destination_filesystem=pafs.LocalFileSystem()
        )

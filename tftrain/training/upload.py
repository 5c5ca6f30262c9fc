"""A rank's files of a checkpoint on their way to storage that is no local disk, while training goes on.

In: a local folder whose files are complete. Out: the same files at their place, or the problem that kept them from it.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from tftrain.training.folder import Folder


class Upload:
    """Copies `source` into `folder` in a thread, then deletes `source`."""

    def __init__(self, source: Path, folder: Folder):
        self.folder = folder
        self.problem: str | None = None
        """What went wrong, known when the thread has ended."""
        self._source = source
        # Not a daemon: a process that ends in peace ends its upload first.
        self._thread = threading.Thread(target=self._run, name="upload")
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether files are still on their way."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Returns when it has ended, with or without success."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.folder.upload(self._source)
        except (OSError, RuntimeError) as error:
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(self._source, ignore_errors=True)

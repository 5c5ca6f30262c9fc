"""A run that is asked to end by SIGTERM (preemption, `ray job stop`) or SIGINT (Ctrl-C) ends between two steps.

In: a signal to the driver. Out: `is_asked`, which the workers learn of, and the exit code 128 + signal. A second signal
ends the driver at once, as if it had been killed: the same command then continues from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether this process was asked to end."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that came."""

    @property
    def is_asked(self) -> bool:
        """True from the first signal on."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Takes the signals over for the time of the block; without effect outside the main thread. Enter it after
        `ray.init`, which sets a handler of its own."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

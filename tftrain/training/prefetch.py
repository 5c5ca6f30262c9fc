"""Makes the next step's batches in a thread while this step computes.

In: an iterator and a function of its items. Out: an iterator of the results, in order, and the seconds spent waiting.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Prefetch(Generic[Out]):
    """`make(item)` for every item, at most `depth` results ahead.

    An error in the thread is raised where its result was due.
    """

    def __init__(self, items: Iterable[In], make: Callable[[In], Out], depth: int = 2):
        self.wait_s = 0.0
        """Seconds that `next` has waited for the thread so far."""
        self._results: queue.Queue = queue.Queue(maxsize=depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, make), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Out]:
        return self

    def __next__(self) -> Out:
        start = time.perf_counter()
        kind, value = self._results.get()
        self.wait_s += time.perf_counter() - start
        if kind == "result":
            return value
        self._results.put((kind, value))
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Ends the thread after the item it is at; results not yet taken are lost."""
        self._is_closed.set()
        # A read that hangs must not keep a run from ending: the thread is a daemon.
        deadline = time.monotonic() + 10
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._results.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, items: Iterable[In], make: Callable[[In], Out]) -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if self._is_closed.is_set():
                    return
                self._results.put(("result", make(item)))
            self._results.put(("end", None))
        except BaseException as error:  # raised again in `next`
            self._results.put(("error", error))
        finally:
            # A generator holds open files until it is closed.
            close = getattr(iterator, "close", None)
            if close:
                close()

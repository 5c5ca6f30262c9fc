"""Rates of a run: cells, tokens, waits and the share of the device's arithmetic that real tokens took.

In: what each step trained on and how long it took. Out: `perf/...`, a mean over the steps since the last line. The time
of held-out losses and checkpoints is left out.
"""

from __future__ import annotations

import resource
import time

import torch

PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Dense bf16 of NVIDIA's data sheets by what the device's name holds, the first match counts."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Of one device in bf16; None for a CPU, another precision and a device that is not in the table."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16_TFLOPS.items() if known in name), None)


class Meter:
    """Sums since the last line of metrics."""

    def __init__(self, device: torch.device, world_size: int, device_tflops: float | None) -> None:
        self._device = device
        self._peak_flops = device_tflops * 1e12 * world_size if device_tflops else None
        self._wait_before_s = 0.0
        self._start = time.perf_counter()
        self._seconds = self._wait_s = self._n_flop = 0.0
        self._n_steps = self._n_cells = self._n_tokens = 0

    def step(self, *, n_cells: int, n_tokens: int, n_flop: float, wait_s: float) -> None:
        """A step of so many cells, tokens and FLOP (over all ranks) has ended; `wait_s` is the wait for data since the
        run began."""
        now = time.perf_counter()
        self._seconds += now - self._start
        self._wait_s += wait_s - self._wait_before_s
        self._wait_before_s = wait_s
        self._n_steps, self._n_cells, self._n_tokens = (
            self._n_steps + 1,
            self._n_cells + n_cells,
            self._n_tokens + n_tokens,
        )
        self._n_flop += n_flop
        self._start = now

    def resume(self) -> None:
        """The next step begins."""
        self._start = time.perf_counter()

    def metrics(self) -> dict[str, float]:
        """`perf/...`, and a new beginning. `perf/mfu` only where the device's peak is known."""
        seconds = max(self._seconds, 1e-9)
        found = {
            "perf/step_s": seconds / max(self._n_steps, 1),
            "perf/cells_per_s": self._n_cells / seconds,
            "perf/tokens_per_s": self._n_tokens / seconds,
            "perf/data_wait_fraction": self._wait_s / seconds,
            "perf/memory_peak_gib": self._peak_bytes() / 2**30,
        }
        if self._peak_flops:
            found["perf/mfu"] = self._n_flop / seconds / self._peak_flops
        self._reset()
        return found

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _reset(self) -> None:
        self._seconds = self._wait_s = self._n_flop = 0.0
        self._n_steps = self._n_cells = self._n_tokens = 0

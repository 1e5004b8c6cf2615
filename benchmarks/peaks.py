"""What the machine can do at best, measured in the same rounds as the contestants.

* ``sgemm``: a square fp32 matrix product by torch: what a library reaches, so a kernel may pass it
* ``float32``, ``int16``: multiply-adds in registers alone (C++): what no kernel of that arithmetic can pass
* ``byte``: the same of single bytes
* ``int8``: the same on a CPU's tiles, as the int8 pass has them: of integers of 15 bits, three products of bytes each
"""

from __future__ import annotations

import statistics

import torch

from vqkernels import _extension
from vqkernels.kernels import compiled

from .runner import Action, Timing

SGEMM = "sgemm"
SGEMM_SIZE = 1024  # large enough for its peak, short enough for every round
SGEMM_SIZE_CUDA = 8192


def sgemm_probe(device: str) -> tuple[Action, int]:
    """A square fp32 matrix product without TF32, and its FLOPs."""
    size = SGEMM_SIZE_CUDA if device.startswith("cuda") else SGEMM_SIZE
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


class Peaks:
    """Collects the rates of a run, round by round, in FLOP/s (a multiply-add counts as two)."""

    def __init__(self, device: str, threads: int) -> None:
        self.sgemm, self._flops = sgemm_probe(device)
        self._threads = threads
        self._has_rates = device == "cpu" and _extension.cpu_library() is None
        self.rates: dict[str, list[float]] = {}

    def measure_round(self) -> None:
        """Once a round, among the contestants."""
        if self._has_rates:
            for name, rate in compiled.peak_rates(self._threads).items():
                if rate > 0:  # 0: the CPU has no such instructions
                    self.rates.setdefault(name, []).append(rate)

    def add_sgemm(self, timing: Timing) -> None:
        """The probe's timing, after the last round."""
        self.rates[SGEMM] = [self._flops / seconds for seconds in timing.samples]

    def medians(self) -> dict[str, float]:
        """FLOP/s of each peak."""
        return {name: statistics.median(values) for name, values in self.rates.items()}

    def percent(self, name: str, flops: int, timing: Timing) -> float | None:
        """The median over rounds of a contestant's share of a peak of its round, in percent."""
        if name not in self.rates:
            return None
        pairs = zip(timing.samples, self.rates[name], strict=True)
        return 100 * statistics.median(flops / seconds / rate for seconds, rate in pairs)

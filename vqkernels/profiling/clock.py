"""Points in time on the CPU, or on the GPU, which works on while the CPU goes ahead."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Seconds between two points: of the CPU, or of the GPU by its own events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        """A point in time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one point to a later one."""
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

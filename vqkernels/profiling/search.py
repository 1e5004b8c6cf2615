"""The search from inside: the time of its stages, and how much of it was certified by the coarse pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import compiled
from .subject import Subject

STAGES = compiled.STAGES
OTHER = "other"  # of the call: Python, the op's dispatch, the allocation of outputs


def no_report(subject: Subject) -> str | None:
    """None where the search can be seen from inside, otherwise why not."""
    backend = subject.backend()
    if subject.options.metric == "dot":
        return "the largest products are found by plain torch, a block of codes at a time"
    if backend != "compiled" or subject.device.type != "cpu":
        return f"the stages are timed by the compiled CPU search alone; this one runs on {backend}, {subject.device}"
    return None


class Watch:
    """Runs the instrumented search and keeps the time and the counters of every call."""

    def __init__(self, subject: Subject, *, changed: bool) -> None:
        self.subject = subject
        self.codebook = subject.codebook.clone() if changed else subject.codebook  # [K, D]
        self.changed = changed
        self.samples: list[dict[str, Any]] = []

    def __call__(self) -> None:
        subject, first = self.subject, self.codebook[0, 0]
        if self.changed:  # by a rounding, and never back: the last few dozen codebooks may all be kept prepared
            first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
        start = time.perf_counter()
        options = subject.options
        report = compiled.nearest_report(subject.batch, self.codebook, options.metric, options.precision)
        seconds = time.perf_counter() - start
        self.samples.append(
            {
                "seconds": seconds,
                "stages": {name: float(report.seconds.get(name, 0.0)) for name in STAGES},
                "coarse_pass": report.coarse_pass,
                "instruction_set": report.instruction_set,
                "threads": report.threads,
                "tokens": report.tokens,
                "certified": report.certified,
                "candidates_per_token": float(report.candidates),
                "codes_reranked": report.codes_reranked,
                "refined": report.refined,
                "scanned": report.scanned,
                "prepared_from_cache": report.prepared_from_cache,
            }
        )

    def median(self) -> dict[str, Any]:
        """The call of median time, whole: its stages belong together and add up to it."""
        ordered = sorted(self.samples, key=lambda sample: sample["seconds"])
        chosen = ordered[(len(ordered) - 1) // 2]
        outside = chosen["seconds"] - sum(chosen["stages"].values())
        return {
            **chosen,
            "stages": {**chosen["stages"], OTHER: max(0.0, outside)},
            "certified_share": chosen["certified"] / max(chosen["tokens"], 1),
            "calls": len(ordered),
        }


def watches(subject: Subject) -> dict[str, Watch]:
    """The search with the codebook of the call before, and with one that has changed since; none without a report."""
    if no_report(subject) is not None:
        return {}
    return {"unchanged": Watch(subject, changed=False), "changed": Watch(subject, changed=True)}


def as_actions(found: dict[str, Watch]) -> dict[str, Callable[[], object]]:
    """The watches as what the runner times."""
    return {f"search, codebook {name}": watch for name, watch in found.items()}

"""k-means from inside: the iterations of ``vqkernels.nn.kmeans``, step by step with a clock beside them."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ..nn.kmeans import first_centroids, prepared
from ..nn.lloyd import Measure, assigned_totals, moved, plus, total_of, zeros
from ..ops import nearest
from .clock import Clock
from .subject import Subject

INIT = "k-means++"
ROUND = ("assignment", "sums", "update")  # of one iteration


class Lloyd:
    """``kmeans`` on the tokens of a subject, from its own start; holds every time and inertia that it passes."""

    def __init__(self, subject: Subject, seed: int = 0) -> None:
        # products are no distance: codes of IBQ are placed by the euclidean one, as its layer does
        self.measure = Measure("euclidean" if subject.options.metric == "dot" else subject.options.metric)
        self.clock, self.seed = Clock(subject.device), torch.tensor(seed, device=subject.device)
        self.tokens = prepared(subject.x, self.measure)
        begin = self.clock.now()
        self.rows: Tensor = first_centroids(  # [K, D]
            INIT, self.tokens, len(subject.codebook), seed, self.measure.metric
        )
        self.start_seconds = self.clock.between(begin, self.clock.now())
        self.rounds: list[dict[str, Any]] = []

    def iterate(self) -> None:
        """One iteration of ``lloyd_``."""
        times = [self.clock.now()]
        found = nearest(self.tokens, self.rows, metric=self.measure.metric, precision=self.measure.precision)
        times.append(self.clock.now())
        totals = plus(zeros(self.rows), self.tokens, *found)
        times.append(self.clock.now())
        self.rows.copy_(moved(self.rows, totals, self.measure, self.seed, len(self.rounds)))
        times.append(self.clock.now())
        spans = (self.clock.between(*times[i : i + 2]) for i in range(len(ROUND)))
        self.rounds.append(
            {
                **dict(zip(ROUND, spans, strict=True)),
                "inertia": float(total_of(totals.inertia)),
                "without_tokens": int((totals.counts == 0).sum()),
            }
        )

    def finish(self) -> tuple[float, float]:
        """Seconds of the pass that ``kmeans`` makes for codes and counts at the end, and the inertia that it finds."""
        begin = self.clock.now()
        totals = assigned_totals([self.tokens], self.rows, self.measure)
        seconds = self.clock.between(begin, self.clock.now())
        return seconds, float(total_of(totals.inertia))


def profile_kmeans(subject: Subject, iterations: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs k-means once.

    Args:
        subject: its tokens are clustered into as many centroids as it has codes; the codes are not looked at.
        iterations: of Lloyd's algorithm.

    Returns:
        the document's ``kmeans``, and the median seconds of each part of an iteration by the kernels' names.
    """
    lloyd = Lloyd(subject)
    for _ in range(iterations):
        lloyd.iterate()
    last, inertia = lloyd.finish()
    sums = {name: sum(each[name] for each in lloyd.rounds) for name in ROUND}
    stages = {"start": lloyd.start_seconds, **sums, "last pass": last}
    document = {
        "iterations": iterations,
        "init": INIT,
        "metric": lloyd.measure.metric,
        "seconds": sum(stages.values()),
        "stages": stages,
        "rounds": lloyd.rounds,
        "inertia": inertia,
    }
    return document, {f"k-means {name}": statistics.median(each[name] for each in lloyd.rounds) for name in ROUND}

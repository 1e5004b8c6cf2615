"""Who can gather the statistics of a step and move an EMA codebook; each returns its codebook after the update."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import codebook_stats, ema_update_

from .problem import EMA_DECAY, EMA_EPS, Problem, initial_state
from .providers import Call, Provider, register
from .step_providers import Statistics, index_add_statistics, one_hot_statistics


def ours(backend: str, problem: Problem) -> Call:
    """``codebook_stats`` and ``ema_update_`` on one backend."""
    assert problem.codes is not None
    state, codes = initial_state(problem.codebook), problem.codes

    def run() -> Tensor:
        with use_backend(backend):
            counts, sums = codebook_stats(problem.x, codes, problem.shape.codes)
            ema_update_(state.codebook, state.cluster_size, state.embed_sum, counts, sums, decay=EMA_DECAY, eps=EMA_EPS)
        return state.codebook

    return run


def torch_ema(statistics: Statistics, problem: Problem) -> Call:
    """``statistics`` and the update in plain torch."""
    assert problem.codes is not None
    state, codes = initial_state(problem.codebook), problem.codes

    def run() -> Tensor:
        state.update_(*statistics(problem.x.float(), codes, problem.shape.codes))
        return state.codebook

    return run


HALF_AND_SINGLE = ("float32", "float16", "bfloat16")
for _backend in ("compiled", "triton", "reference"):
    register(Provider(f"vqkernels-{_backend}", "ema", partial(ours, _backend), ours=True, dtypes=HALF_AND_SINGLE))
register(
    Provider(
        "torch-index-add",
        "ema",
        partial(torch_ema, index_add_statistics),
        dtypes=HALF_AND_SINGLE,
        note="bincount + index_add_",
    )
)
register(
    Provider(
        "torch-one-hot",
        "ema",
        partial(torch_ema, one_hot_statistics),
        dtypes=HALF_AND_SINGLE,
        bytes_per_score=12,
        note="one_hot.t() @ x",
    )
)

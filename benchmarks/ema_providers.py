"""Who can gather the statistics of a step and move an EMA codebook; each returns its codebook after the update."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops._library import as_tokens, run

from .problem import EMA_DECAY, EMA_EPS, Problem, initial_state
from .providers import Call, Provider, register
from .step_providers import Statistics, index_add_statistics, one_hot_statistics


def ours(backend: str, problem: Problem) -> Call:
    """What an EMA quantizer does on one backend: statistics into its pending sums, then the update that clears them."""
    assert problem.codes is not None
    state, codes = initial_state(problem.codebook), as_tokens(problem.codes[:, None])[..., 0]
    x = as_tokens(problem.x)
    pending = (torch.zeros_like(state.cluster_size), torch.zeros_like(state.embed_sum), state.cluster_size > 2)

    def run_step() -> Tensor:
        with use_backend(backend):
            run("add_statistics_", x, codes, *pending[:2])
            rows = (state.codebook, state.cluster_size, state.embed_sum)
            run("ema_update_", *rows, *pending, EMA_DECAY, EMA_EPS, 1.0, False, False, True)
        return state.codebook

    return run_step


def at_once(backend: str, problem: Problem) -> Call:
    """What a module does that applies its statistics in the same call, as vector-quantize-pytorch's do."""
    assert problem.codes is not None
    state, codes = initial_state(problem.codebook), as_tokens(problem.codes[:, None])[..., 0]
    x = as_tokens(problem.x)

    def run_step() -> Tensor:
        with use_backend(backend):
            run("ema_step_", x, codes, state.codebook, state.cluster_size, state.embed_sum, EMA_DECAY, EMA_EPS, False)
        return state.codebook

    return run_step


def read_and_write(problem: Problem) -> Call:
    """The least that memory has to do: read x once, write the codebook and its statistics once.

    No update can do without reading the statistics, too. That is in it: ``fill_`` stores into lines that the processor
    reads first, and takes as long as a multiplication in place, in the caches and beyond them. Like everybody it is
    called again and again, so what fits into the last cache is found there, by it as by the others.
    """
    state = initial_state(problem.codebook)

    def run() -> None:
        problem.x.sum()
        for each in (state.codebook, state.cluster_size, state.embed_sum):
            each.fill_(1.0)

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
        "vqkernels-at-once",
        "ema",
        partial(at_once, "compiled"),
        ours=True,
        dtypes=HALF_AND_SINGLE,
        note="one op, no array of sums: the vector-quantize-pytorch stand-in's update",
    )
)
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
register(
    Provider(
        "read-and-write",
        "ema",
        read_and_write,
        yardstick=True,
        note="x.sum() and fill_() of codebook, sizes and sums",
    )
)

"""Who can find the k nearest codes of every token, the nearest token of every code, and that with the search."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import nearest, nearest_both, nearest_k, nearest_tokens

from .plain import blocked_argmin, blocked_top
from .problem import Problem
from .providers import Both, Call, Provider, register

SINGLE = ("float32",)


def our_nearest_k(backend: str, problem: Problem) -> Call:
    """``vqkernels.nearest_k`` on one backend."""

    def run() -> Tensor:
        with use_backend(backend):
            return nearest_k(problem.x, problem.codebook, problem.nearest)[0]

    return run


def our_nearest_tokens(backend: str, problem: Problem) -> Call:
    """``vqkernels.nearest_tokens`` on one backend."""

    def run() -> Tensor:
        with use_backend(backend):
            return nearest_tokens(problem.x, problem.codebook)[0]

    return run


def our_nearest_both(backend: str, problem: Problem) -> Call:
    """``vqkernels.nearest_both`` on one backend."""

    def run() -> Both:
        with use_backend(backend):
            codes, _, tokens, _ = nearest_both(problem.x, problem.codebook)
            return Both(codes, tokens)

    return run


def two_searches(problem: Problem) -> Call:
    """``vqkernels.nearest`` and then ``nearest_tokens``, as the backends are chosen."""
    return lambda: Both(nearest(problem.x, problem.codebook)[0], nearest_tokens(problem.x, problem.codebook)[0])


def faiss_search(columns: bool, problem: Problem) -> Call:
    """``faiss.knn``; with ``columns`` of the codes among the tokens."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, codebook = problem.x.contiguous().numpy(), problem.codebook.contiguous().numpy()
    if columns:
        return lambda: torch.from_numpy(faiss.knn(codebook, x, 1)[1][:, 0])
    return lambda: torch.from_numpy(faiss.knn(x, codebook, problem.nearest)[1])


def _register_ours() -> None:
    for backend in ("compiled", "reference"):
        register(Provider(f"vqkernels-{backend}", "nearest-k", partial(our_nearest_k, backend), ours=True))
    for backend in ("compiled", "triton", "reference"):
        register(Provider(f"vqkernels-{backend}", "nearest-tokens", partial(our_nearest_tokens, backend), ours=True))
        register(Provider(f"vqkernels-{backend}", "nearest-both", partial(our_nearest_both, backend), ours=True))
    note = "nearest, then nearest_tokens"
    register(Provider("two-searches", "nearest-both", two_searches, ours=True, note=note))


def _register_peers() -> None:
    def chunked_k(problem: Problem) -> Call:
        return lambda: blocked_top(problem.x, problem.codebook, problem.nearest)

    def chunked_tokens(problem: Problem) -> Call:
        return lambda: blocked_argmin(problem.codebook, problem.x)

    def chunked_both(problem: Problem) -> Call:
        x, codebook = problem.x, problem.codebook
        return lambda: Both(blocked_argmin(x, codebook), blocked_argmin(codebook, x))

    note = "addmm + topk over blocks of tokens"
    register(Provider("torch-chunked", "nearest-k", chunked_k, dtypes=SINGLE, note=note))
    note = "addmm + argmin over blocks of codes"
    register(Provider("torch-chunked", "nearest-tokens", chunked_tokens, dtypes=SINGLE, note=note))
    note = "addmm + argmin, twice"
    register(Provider("torch-chunked", "nearest-both", chunked_both, dtypes=SINGLE, note=note))
    for operation, columns in (("nearest-k", False), ("nearest-tokens", True)):
        register(
            Provider(
                "faiss",
                operation,
                partial(faiss_search, columns),
                package="faiss",
                install="faiss-cpu",
                devices=("cpu",),
                dtypes=SINGLE,
                note="knn",
            )
        )


_register_ours()
_register_peers()

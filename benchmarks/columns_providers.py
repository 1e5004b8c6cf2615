"""Who can find the k nearest codes of every token, and the nearest token of every code."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import nearest_k, nearest_tokens

from .plain import blocked_argmin, blocked_top
from .problem import Problem
from .providers import Call, Provider, register

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


def _register_peers() -> None:
    def chunked_k(problem: Problem) -> Call:
        return lambda: blocked_top(problem.x, problem.codebook, problem.nearest)

    def chunked_tokens(problem: Problem) -> Call:
        return lambda: blocked_argmin(problem.codebook, problem.x)

    note = "addmm + topk over blocks of tokens"
    register(Provider("torch-chunked", "nearest-k", chunked_k, dtypes=SINGLE, note=note))
    note = "addmm + argmin over blocks of codes"
    register(Provider("torch-chunked", "nearest-tokens", chunked_tokens, dtypes=SINGLE, note=note))
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

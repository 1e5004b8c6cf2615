"""Who can find the nearest code: ours by backend, what users write in torch, and the libraries they would pick."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import nearest

from .problem import Problem
from .providers import Call, Provider, Unavailable, register

CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 1 << 20, 1 << 26  # scores held at once by torch-chunked: L2 of a core; a few waves


def search_with(backend: str | None, problem: Problem) -> Call:
    """``vqkernels.nearest`` on one backend, or on the one that it picks by itself."""

    def run() -> Tensor:
        with use_backend(backend):
            return nearest(problem.x, problem.codebook)[0]

    return run


def half_squares(codebook: Tensor) -> Tensor:  # codebook [K, D] -> [K]
    """|c|^2 / 2."""
    return codebook.square().sum(dim=1) / 2


def addmm_scores(x: Tensor, codebook: Tensor) -> Tensor:  # x [N, D], codebook [K, D] -> [N, K]
    """|c|^2 / 2 - x.c: the squared distance but for what is the same for every code."""
    return torch.addmm(half_squares(codebook), x, codebook.t(), alpha=-1)


def expanded_scores(x: Tensor, codebook: Tensor) -> Tensor:  # x [N, D], codebook [K, D] -> [N, K]
    """|x|^2 + |c|^2 - 2 x.c: the line of nearly every public VQ layer."""
    return x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1) - 2 * x @ codebook.t()


def torch_cdist(problem: Problem) -> Call:
    """``torch.cdist`` and ``argmin``."""
    return lambda: torch.cdist(problem.x, problem.codebook).argmin(dim=1)


def torch_expanded(problem: Problem) -> Call:
    """The expanded form and ``argmin``."""
    return lambda: expanded_scores(problem.x, problem.codebook).argmin(dim=1)


def torch_expanded_bf16(problem: Problem) -> Call:
    """The expanded form as it runs inside a training loop under bfloat16 autocast."""

    def run() -> Tensor:
        with torch.autocast(problem.x.device.type, dtype=torch.bfloat16):
            return expanded_scores(problem.x, problem.codebook).argmin(dim=1)

    return run


def torch_addmm(problem: Problem) -> Call:
    """One ``addmm`` and ``argmin``: the quickest short form in torch."""
    return lambda: addmm_scores(problem.x, problem.codebook).argmin(dim=1)


def torch_chunked(problem: Problem) -> Call:
    """``addmm`` and ``argmin`` over blocks of tokens whose scores stay in cache."""
    budget = CUDA_CHUNK_BYTES if problem.x.is_cuda else CPU_CHUNK_BYTES
    rows = max(1, budget // (problem.x.element_size() * problem.shape.codes))

    def run() -> Tensor:
        bias, transposed = half_squares(problem.codebook), problem.codebook.t()
        blocks = problem.x.split(rows)
        return torch.cat([torch.addmm(bias, block, transposed, alpha=-1).argmin(dim=1) for block in blocks])

    return run


def torch_compiled(problem: Problem) -> Call:
    """``torch.compile`` of ``addmm`` and ``argmin``; compiling is not timed."""
    torch._dynamo.reset()
    options: dict[str, Any] = {}
    if not problem.x.is_cuda:
        options["cpp.threads"] = torch.get_num_threads()  # otherwise those of the first compilation stay
    search = torch.compile(lambda x, codebook: addmm_scores(x, codebook).argmin(dim=1), options=options)
    try:
        search(problem.x, problem.codebook)
    except Exception as error:
        raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0]}") from error
    return lambda: search(problem.x, problem.codebook)


def faiss_flat(problem: Problem) -> Call:
    """faiss ``IndexFlatL2``, k = 1, at its best setting: without the threshold its small batches take a slow path."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(problem.shape.dim)
    index.add(problem.codebook.contiguous().numpy())  # a copy of the codebook, outside the timing
    tokens = problem.x.contiguous().numpy()
    return lambda: torch.from_numpy(index.search(tokens, 1)[1][:, 0])


def sklearn_argmin(problem: Problem) -> Call:
    """scikit-learn ``pairwise_distances_argmin`` (float64 inside)."""
    from sklearn.metrics import pairwise_distances_argmin

    tokens, codebook = problem.x.numpy(), problem.codebook.numpy()
    return lambda: torch.from_numpy(pairwise_distances_argmin(tokens, codebook).astype("int64"))


def _register_ours() -> None:
    for backend in ("compiled", "triton", "reference"):
        register(Provider(f"vqkernels-{backend}", "search", partial(search_with, backend), ours=True))
    automatic = "the backend that vqkernels picks by itself"
    register(Provider("vqkernels", "search", partial(search_with, None), ours=True, optional=True, note=automatic))


def _register_torch() -> None:
    wide = ("float32", "float64")
    register(Provider("torch-cdist", "search", torch_cdist, dtypes=wide, bytes_per_score=4, note="cdist + argmin"))
    register(Provider("torch-expanded", "search", torch_expanded, bytes_per_score=12, note="x^2 + c^2 - 2xc"))
    register(
        Provider(
            "torch-expanded-bf16",
            "search",
            torch_expanded_bf16,
            dtypes=("float32",),
            bytes_per_score=12,
            note="x^2 + c^2 - 2xc under bf16 autocast",
        )
    )
    register(Provider("torch-addmm", "search", torch_addmm, bytes_per_score=4, note="addmm + argmin"))
    register(Provider("torch-chunked", "search", torch_chunked, note="addmm + argmin over blocks of tokens"))
    register(
        Provider("torch-compile", "search", torch_compiled, bytes_per_score=4, note="torch.compile(addmm + argmin)")
    )


def _register_libraries() -> None:
    register(
        Provider(
            "faiss",
            "search",
            faiss_flat,
            package="faiss",
            install="faiss-cpu",
            devices=("cpu",),
            dtypes=("float32",),
            note="IndexFlatL2, distance_compute_blas_threshold=1",
        )
    )
    register(
        Provider(
            "sklearn",
            "search",
            sklearn_argmin,
            package="sklearn",
            install="scikit-learn",
            devices=("cpu",),
            dtypes=("float32", "float64"),
            note="pairwise_distances_argmin",
        )
    )


_register_ours()
_register_torch()
_register_libraries()

"""Who can quantize tokens as inference does: codes, the rows that they name, and squared errors; no gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import quantize

from .problem import Problem
from .providers import Call, Lookup, Provider, providers_of, register
from .search_providers import addmm_scores, compiled_by_torch

OPERATION = "quantize"
SEARCHES = ("torch-cdist", "torch-expanded", "torch-addmm", "torch-chunked", "faiss", "sklearn")


def ours(backend: str, problem: Problem) -> Call:
    """``vqkernels.quantize`` on one backend."""

    def run() -> Lookup:
        with use_backend(backend), torch.no_grad():
            out = quantize(problem.x, problem.codebook)
        return Lookup(out.quantized, out.codes, out.commitment_error)

    return run


def look_up(x: Tensor, codebook: Tensor, codes: Tensor) -> Lookup:  # x [N, D], codebook [K, D], codes [N]
    """Rows and errors in plain torch."""
    quantized = codebook[codes]
    return Lookup(quantized, codes, (x - quantized).square().sum(dim=1))


def with_lookup(search: Callable[[Problem], Call], problem: Problem) -> Call:
    """A search, and ``look_up`` of what it found."""
    find = search(replace(problem, operation="search"))

    def run() -> Lookup:
        codes = find()
        assert isinstance(codes, Tensor)
        return look_up(problem.x, problem.codebook, codes)

    return run


def torch_compiled(problem: Problem) -> Call:
    """``torch.compile`` of addmm, argmin and ``look_up`` in one."""

    def forward(x: Tensor, codebook: Tensor) -> Lookup:  # x [N, D], codebook [K, D]
        return look_up(x, codebook, addmm_scores(x, codebook).argmin(dim=1))

    return compiled_by_torch(forward, problem)


def vector_quantize_pytorch(problem: Problem) -> Call:
    """lucidrains' ``VectorQuantize`` in eval mode."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(problem.shape.dim, problem.shape.codes).to(problem.x.device).eval()
    layer._codebook.embed.data = problem.codebook[None]

    def run() -> Lookup:
        with torch.no_grad():
            quantized, codes, loss = layer(problem.x[None])
        return Lookup(quantized[0], codes[0], loss)

    return run


for _backend in ("compiled", "triton", "reference"):
    register(Provider(f"vqkernels-{_backend}", OPERATION, partial(ours, _backend), ours=True))
for _search in providers_of("search"):
    if _search.name in SEARCHES:
        _note = f"{_search.note}; codebook[codes]"
        register(replace(_search, operation=OPERATION, prepare=partial(with_lookup, _search.prepare), note=_note))
register(
    Provider(
        "torch-compile", OPERATION, torch_compiled, bytes_per_score=4, note="torch.compile(addmm + argmin + lookup)"
    )
)
register(
    Provider(
        "vector-quantize-pytorch",
        OPERATION,
        vector_quantize_pytorch,
        package="vector_quantize_pytorch",
        install="vector-quantize-pytorch",
        dtypes=("float32",),
        bytes_per_score=24,
        note="VectorQuantize.eval()",
    )
)

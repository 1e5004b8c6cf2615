"""Who can find the nearest code on a GPU alone: flash-kmeans, stand-ins for libraries too large to bring, a bound.

A stand-in does in torch or Triton what the library does inside, and says so in its name; its time is not the library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem
from .providers import Call, Provider, register
from .search_providers import addmm_scores, half_squares

TILE_ROWS = 1024  # as faiss tiles its queries


def flash_kmeans(problem: Problem) -> Call:
    """The assignment kernel of flash-kmeans; |x|^2 is prepared once, as its k-means does."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    x = problem.x[None]  # [1, N, D]
    squares = x.square().sum(dim=-1)
    return lambda: euclid_assign_triton(x, problem.codebook[None], squares)[0].long()


def faiss_gpu_stand_in(problem: Problem) -> Call:
    """fp32 ``torch.mm`` over tiles of tokens and the smallest of each row."""

    def run() -> Tensor:
        bias, transposed = half_squares(problem.codebook), problem.codebook.t()
        tiles = problem.x.split(TILE_ROWS)
        return torch.cat([torch.min(bias - torch.mm(tile, transposed), dim=1).indices for tile in tiles])

    return run


def cuvs_hopper_stand_in(problem: Problem) -> Call:
    """One fused Triton kernel whose products are three of TF32."""
    from .triton_stand_in import nearest

    return lambda: nearest(problem.x, problem.codebook, half_squares(problem.codebook))


def cuvs_blackwell_stand_in(problem: Problem) -> Call:
    """TF32 ``addmm`` into an N x K matrix, and ``argmin``."""

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return addmm_scores(problem.x, problem.codebook).argmin(dim=1)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def fp16_gemm(problem: Problem) -> Call:
    """A matrix product of as many multiply-adds in fp16: what a search at 16 bits cannot go below by much."""
    x, transposed = problem.x.half(), problem.codebook.half().t()
    out = x.new_empty(problem.shape.tokens, problem.shape.codes)

    def run() -> None:
        torch.mm(x, transposed, out=out)

    return run


GPU, SINGLE = ("cuda",), ("float32",)
register(
    Provider(
        "flash-kmeans",
        "search",
        flash_kmeans,
        package="flash_kmeans",
        install="flash-kmeans",
        devices=GPU,
        dtypes=("float32", "float16", "bfloat16"),
        note="its assignment kernel",
    )
)
register(
    Provider(
        "faiss-gpu-stand-in",
        "search",
        faiss_gpu_stand_in,
        devices=GPU,
        dtypes=SINGLE,
        note="tiled fp32 torch.mm + row min, in place of faiss-gpu",
    )
)
register(
    Provider(
        "cuvs-hopper-stand-in",
        "search",
        cuvs_hopper_stand_in,
        package="triton",
        install="triton",
        devices=GPU,
        dtypes=SINGLE,
        note="fused Triton kernel in 3 x TF32, in place of cuVS on Hopper",
    )
)
register(
    Provider(
        "cuvs-blackwell-stand-in",
        "search",
        cuvs_blackwell_stand_in,
        devices=GPU,
        dtypes=SINGLE,
        bytes_per_score=4,
        note="TF32 addmm + argmin, in place of cuVS on Blackwell",
    )
)
register(
    Provider(
        "cublas-fp16-gemm",
        "search",
        fp16_gemm,
        yardstick=True,
        devices=GPU,
        bytes_per_score=2,
        note="torch.mm of equal FLOPs in fp16: the speed of light, no search",
    )
)

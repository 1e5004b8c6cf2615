"""Who can run a quantizer's training step: forward, backward to the tokens, and the EMA update of the codebook.

Every provider starts from the same codebook with decay 0.8 and commitment weight 1 (vector-quantize-pytorch's
defaults), and sends the same gradient back by the same rule: the rotation trick (its default) or straight-through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.backends import use_backend

from .problem import COMMITMENT_WEIGHT, EMA_DECAY, EMA_EPS, Problem, initial_state
from .providers import Call, Provider, Result, register
from .search_providers import addmm_scores

Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # x -> quantized, codes, loss
Statistics = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # x, codes, K -> counts, sums


def training_step(problem: Problem, forward: Forward, *, batched: bool = False) -> Call:
    """Forward and backward as a training loop runs them; ``batched`` gives the layer [1, N, D]."""
    assert problem.dquantized is not None
    x, dquantized = problem.x.detach().clone(), problem.dquantized
    if batched:
        x, dquantized = x[None], dquantized[None]
    x.requires_grad_()

    def run() -> Tensor:
        x.grad = None
        quantized, codes, loss = forward(x)
        torch.autograd.backward((quantized, loss), (dquantized, torch.ones_like(loss)))
        return codes.reshape(-1)

    return run


def ours(backend: str, problem: Problem) -> Call:
    """``vqkernels.VectorQuantizer`` on one backend."""
    from vqkernels.nn import VectorQuantizer

    layer = VectorQuantizer(
        problem.shape.dim,
        problem.shape.codes,
        ema_decay=EMA_DECAY,
        eps=EMA_EPS,
        commitment_weight=COMMITMENT_WEIGHT,
        gradient=problem.gradient,
    ).to(problem.x.device)
    with torch.no_grad():
        layer.codebook.copy_(problem.codebook)
        layer.embed_sum.copy_(problem.codebook)
        layer.cluster_size.fill_(1.0)
    step = training_step(problem, lambda x: tuple(layer(x)))

    def run() -> Result:
        with use_backend(backend):
            codes = step()
            layer.update_codebook()  # otherwise left to the next forward; a whole step has it inside
        return codes

    return run


def vector_quantize_pytorch(problem: Problem) -> Call:
    """lucidrains' ``VectorQuantize`` with its default EMA codebook."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(
        problem.shape.dim,
        problem.shape.codes,
        decay=EMA_DECAY,
        eps=EMA_EPS,
        commitment_weight=COMMITMENT_WEIGHT,
        rotation_trick=problem.gradient == "rotation",
    ).to(problem.x.device)
    inner = layer._codebook
    inner.embed.data.copy_(problem.codebook[None])
    inner.embed_avg.data.copy_(problem.codebook[None])
    inner.cluster_size.data.fill_(1.0)
    return training_step(problem, layer, batched=True)


class _Rotated(torch.autograd.Function):
    """The rotation trick as a plain torch layer would write it (Fifty et al. 2024)."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor) -> Tensor:  # x [N, D], quantized [N, D]
        ctx.save_for_backward(x, quantized)
        return quantized.clone()

    @staticmethod
    def backward(ctx, dquantized: Tensor) -> tuple[Tensor, None]:  # dquantized [N, D]
        x, quantized = ctx.saved_tensors
        u, v = F.normalize(x, dim=1), F.normalize(quantized, dim=1)
        w = F.normalize(u + v, dim=1)
        scale = quantized.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        along_w, along_v = ((dquantized * axis).sum(dim=1, keepdim=True) for axis in (w, v))
        return scale * (dquantized - 2 * along_w * w + 2 * along_v * u), None


def torch_layer(statistics: Statistics, problem: Problem) -> Call:
    """A hand-written EMA layer: addmm + argmin, and ``statistics`` for the update."""
    state = initial_state(problem.codebook)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # x [N, D]
        with torch.no_grad():
            codes = addmm_scores(x, state.codebook).argmin(dim=1)
            target = state.codebook[codes]
            state.update_(*statistics(x, codes, problem.shape.codes))
        loss = COMMITMENT_WEIGHT * F.mse_loss(x, target)
        rotated = problem.gradient == "rotation"
        return (_Rotated.apply(x, target) if rotated else x + (target - x).detach()), codes, loss

    return training_step(problem, forward)


def index_add_statistics(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Counts [K] and sums [K, D] of x [N, D] by ``bincount`` and ``index_add_``."""
    sums = x.new_zeros(codebook_size, x.shape[1]).index_add_(0, codes, x)
    return torch.bincount(codes, minlength=codebook_size), sums


def one_hot_statistics(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Counts [K] and sums [K, D] of x [N, D] by a matrix of ones and zeros, as in the first VQ-VAE code."""
    one_hot = F.one_hot(codes, codebook_size).to(x.dtype)
    return one_hot.sum(dim=0), one_hot.t() @ x


OPERATION = "train-step"
for _backend in ("compiled", "triton", "reference"):
    register(Provider(f"vqkernels-{_backend}", OPERATION, partial(ours, _backend), ours=True, dtypes=("float32",)))
register(
    Provider(
        "vector-quantize-pytorch",
        OPERATION,
        vector_quantize_pytorch,
        package="vector_quantize_pytorch",
        install="vector-quantize-pytorch",
        dtypes=("float32",),
        bytes_per_score=24,
        note="VectorQuantize, its default EMA codebook",
    )
)
register(
    Provider(
        "torch-index-add",
        OPERATION,
        partial(torch_layer, index_add_statistics),
        dtypes=("float32",),
        bytes_per_score=4,
        note="addmm + argmin, index_add_",
    )
)
register(
    Provider(
        "torch-one-hot",
        OPERATION,
        partial(torch_layer, one_hot_statistics),
        dtypes=("float32",),
        bytes_per_score=12,
        note="addmm + argmin, one_hot.t() @ x",
    )
)

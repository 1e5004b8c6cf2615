"""Who can compute the entropy loss of a batch over the whole codebook, and its gradients.

    loss = mean_n H(p_n) - H(mean_n p_n),   p_n = softmax_k(-|x_n - c_k|^2 / T),   T = D / 16

At that temperature logits of N(0, 1) rows stay within float32's reach of 1e-5.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.ops import entropy_loss, sign_entropy_loss, sign_rows

from .problem import Problem, entropy_temperature
from .providers import Call, EntropyGradients, Provider, Unavailable, register

CHUNK_LOGITS = 1 << 22  # 16 MiB; of 2^18 to 2^24 the quickest at (64, 262144, 18) on a Zen 5 core


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.x.detach().clone().requires_grad_(), problem.codebook.detach().clone().requires_grad_()


def ours(backend: str, problem: Problem) -> Call:
    """``vqkernels.entropy_loss`` on one backend."""
    x, codebook = _leaves(problem)
    temperature = entropy_temperature(problem.shape)

    def run() -> EntropyGradients:
        with use_backend(backend):
            loss = entropy_loss(x, codebook, temperature=temperature).loss
            return EntropyGradients(loss.detach(), *torch.autograd.grad(loss, (x, codebook)))

    return run


def signs(problem: Problem) -> Call:
    """``vqkernels.sign_entropy_loss``: the closed form, where the codebook is that of lookup-free quantization."""
    codes, dim = problem.codebook.shape
    every = codes == 1 << dim and torch.equal(sign_rows(torch.arange(codes), dim), problem.codebook.cpu().float())
    if not every:
        raise Unavailable("the codebook is not that of all 2^D sign vectors (data signs, K = 2^D)")
    x, _ = _leaves(problem)
    temperature = entropy_temperature(problem.shape)

    def run() -> EntropyGradients:
        loss = sign_entropy_loss(x, temperature=temperature).loss
        return EntropyGradients(loss.detach(), torch.autograd.grad(loss, x)[0], None)

    return run


def _logits(x: Tensor, codebook: Tensor, temperature: float) -> Tensor:  # [n, D], [K, D] -> [n, K]
    """-|x - c|^2 / T up to a number a token."""
    return torch.addmm(-codebook.square().sum(1) / temperature, x, codebook.t(), alpha=2 / temperature)


def torch_plain(problem: Problem) -> Call:
    """As the peers write it: [N, K] probabilities, and autograd."""
    x, codebook = _leaves(problem)
    temperature = entropy_temperature(problem.shape)

    def run() -> EntropyGradients:
        log_p = _logits(x, codebook, temperature).log_softmax(1)
        p = log_p.exp()
        mean = p.mean(0)
        loss = -(p * log_p).sum(1).mean() + (mean * mean.clamp(min=1e-30).log()).sum()
        return EntropyGradients(loss.detach(), *torch.autograd.grad(loss, (x, codebook)))

    return run


def torch_chunked(problem: Problem) -> Call:
    """The same by blocks of tokens, in two passes: the mean distribution first, then the gradients of each block."""
    x, codebook = _leaves(problem)
    temperature, tokens = entropy_temperature(problem.shape), problem.shape.tokens
    rows = max(1, CHUNK_LOGITS // problem.shape.codes)

    def run() -> EntropyGradients:
        x.grad = codebook.grad = None
        with torch.no_grad():
            mean = torch.zeros_like(codebook[:, 0])
            for block in x.split(rows):
                mean += _logits(block, codebook, temperature).softmax(1).sum(0)
            mean /= tokens
            slope = mean.clamp(min=1e-30).log_()
        total = (mean * slope).sum()
        for start in range(0, tokens, rows):
            log_p = _logits(x[start : start + rows], codebook, temperature).log_softmax(1)
            p = log_p.exp()
            entropy = -(p * log_p).sum() / tokens
            (entropy + (p.sum(0) * slope).sum() / tokens).backward()
            total = total + entropy.detach()
        assert x.grad is not None
        return EntropyGradients(total, x.grad, codebook.grad)

    return run


def _register_all() -> None:
    operation, single = "entropy", ("float32",)
    for backend in ("compiled", "triton", "reference"):
        prepare = partial(ours, backend)
        register(Provider(f"vqkernels-{backend}", operation, prepare, ours=True, dtypes=single))
    note = "sign_entropy_loss, for a codebook of all sign vectors"
    register(Provider("vqkernels-signs", operation, signs, ours=True, dtypes=single, note=note))
    note = "blocks of tokens, two passes, autograd in each block"
    register(Provider("torch-chunked", operation, torch_chunked, dtypes=single, note=note))
    note = "softmax of the N x K logits and autograd"
    register(Provider("torch-plain", operation, torch_plain, dtypes=single, bytes_per_score=28, note=note))


_register_all()

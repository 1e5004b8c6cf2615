"""Sampling and index propagation: their formulas, on every backend."""

from __future__ import annotations

import torch
from quantizers import randn
from softmax_data import D, N, T, assert_near, data, every_metric, float32_error, wide
from softmax_formulas import logits
from torch import Tensor
from torch.nn import functional as F

import vqkernels as vq

# ---- sampling ----


def _chi_square(counts: Tensor, expected: Tensor) -> float:
    """Statistic over the cells that expect 5 or more, the rest pooled."""
    large = expected >= 5
    pooled = torch.stack([counts[~large].sum(), expected[~large].sum()])
    terms = (counts - expected)[large].square() / expected[large]
    rest = (pooled[0] - pooled[1]).square() / pooled[1] if pooled[1] > 0 else torch.zeros(())
    return (terms.sum() + rest).item()


@every_metric
def test_draws_follow_the_probabilities(backend, metric: str):
    name, device = backend
    draws = 500 if name == "triton" else 4000
    x, codebook = (t.detach() for t in data(device=device, n=3, k=16, d=4))
    tokens = x.repeat(draws, 1)  # each token many times
    codes = vq.sample_codes(tokens, codebook, metric=metric, temperature=1.5, seed=11, step=3).cpu().view(draws, 3)
    p = logits(*wide(x, codebook), metric, 1.5).softmax(1).detach()
    for token in range(3):
        counts = torch.bincount(codes[:, token], minlength=16).double()
        # the 99.9 % point of chi-square with 15 degrees of freedom is 37.7; fewer cells only lower it
        assert _chi_square(counts, draws * p[token]) < 37.7


def test_a_draw_is_a_function_of_seed_step_and_place(backend):
    _, device = backend
    x, codebook = (t.detach() for t in data(device=device))

    def draw(seed, step) -> list[int]:
        return vq.sample_codes(x, codebook, temperature=20.0, seed=seed, step=step).tolist()

    first = draw(1, 2)
    assert first == draw(1, 2) == draw(torch.tensor(1, device=device), torch.tensor(2, device=device))
    assert first != draw(1, 3)
    assert first != draw(2, 2)
    with vq.use_backend("reference"):  # none of these uniform numbers is within rounding of a step
        assert first == draw(1, 2)


def test_cold_draws_are_the_nearest_codes_and_bad_tokens_have_none(backend):
    _, device = backend
    x, codebook = (t.detach() for t in data(device=device))
    x[7, 0] = torch.nan
    codes = vq.sample_codes(x, codebook, temperature=1e-4)
    assert torch.equal(codes, vq.nearest(x, codebook)[0])
    assert codes[7] == -1


@every_metric
def test_draws_at_logits_of_1e9_and_beyond_are_the_likeliest_codes(backend, metric: str):
    """Rounding of lse is far more than what separates the codes there."""
    _, device = backend
    x = randn(200, 8).to(device)
    codebook = randn(300, 8, seed=1).to(device)
    book, tokens = codebook.double(), x.double()
    if metric == "cosine":
        book, tokens = F.normalize(book, dim=1), F.normalize(tokens, dim=1)
    scores = -torch.cdist(tokens, book).square() if metric == "euclidean" else tokens @ book.T
    best = scores.amax(1)
    for temperature in (1e-9, 1e-12, 1e-30):
        codes = vq.sample_codes(x, codebook, metric=metric, temperature=temperature, seed=1)
        assert (codes >= 0).all()
        short = best - scores.gather(1, codes[:, None])[:, 0]
        assert (short <= 16 * 2.0**-23 * (best.abs() + tokens.norm(dim=1) * book.norm(dim=1).max())).all()


# ---- index propagation ----


def _hard_soft(x: Tensor, codebook: Tensor, metric: str, codes: Tensor) -> Tensor:
    """IBQ's forward with one-hot rows, [N, D]."""
    p = logits(x, codebook, metric, T).softmax(1)
    rows = F.normalize(codebook, dim=1) if metric == "cosine" else codebook
    return (F.one_hot(codes, len(codebook)) - p.detach() + p) @ rows


@every_metric
def test_index_propagation_is_the_hard_row_with_the_soft_gradient(backend, metric: str):
    _, device = backend
    x, codebook = data(device=device)
    out = vq.index_propagation(x, codebook, metric=metric, temperature=T)
    x64, codebook64 = wide(x, codebook)
    assert torch.equal(out.codes.cpu(), logits(x64, codebook64, metric, T).argmax(1))
    if metric != "cosine":
        assert torch.equal(out.quantized, codebook[out.codes])
    truth = _hard_soft(x64, codebook64, metric, out.codes.cpu())
    assert_near(out.quantized, truth, 1e-6)
    g = randn(N, D, seed=7)
    mine = torch.autograd.grad((out.quantized * g.to(device)).sum(), (x, codebook))
    true = torch.autograd.grad((truth * g.double()).sum(), (x64, codebook64))
    error = float32_error(x64, codebook64, metric, T)
    for a, b in zip(mine, true, strict=True):
        assert_near(a, b, 4 * error)


def test_the_largest_product_over_several_blocks_and_the_lowest_index_on_ties():
    x, codebook = randn(600, 4), randn(5000, 4, seed=1)
    codebook[4500] = codebook[3] = 10 * x[7]  # a tie across blocks
    codes = vq.index_propagation(x, codebook).codes
    products = x.double() @ codebook.double().T
    chosen = products.gather(1, codes[:, None])[:, 0]
    assert (products.amax(1) - chosen <= 6 * 2.0**-24 * (x.abs() @ codebook.abs().T).amax(1)).all()
    assert codes[7] == 3


def test_the_whole_ibq_loss(backend):
    _, device = backend
    x, codebook = data(device=device)
    found = vq.index_propagation(x, codebook, temperature=T)
    loss = (found.quantized - x).square().mean() + found.commitment_error.mean() / D
    loss = loss + 0.25 * found.codebook_error.mean() / D
    x64, codebook64 = wide(x, codebook)
    soft, hard = _hard_soft(x64, codebook64, "dot", found.codes.cpu()), codebook64[found.codes.cpu()]
    truth = (soft - x64).square().mean() + (hard.detach() - x64).square().mean()
    truth = truth + 0.25 * (hard - x64.detach()).square().mean()
    assert_near(loss, truth, 1e-5)
    grads, true = torch.autograd.grad(loss, (x, codebook)), torch.autograd.grad(truth, (x64, codebook64))
    for a, b in zip(grads, true, strict=True):
        assert_near(a, b, 4 * float32_error(x64, codebook64, "dot", T))


def test_index_propagation_with_masked_and_bad_tokens(backend):
    _, device = backend
    x, codebook = data(device=device)
    spoiled = x.detach().clone()
    spoiled[[2, 5]] = torch.nan
    spoiled.requires_grad_()
    mask = torch.ones(N, dtype=torch.bool, device=device)
    mask[[0, 2]] = False  # one of the masked tokens is bad, and one that is not masked
    out = vq.index_propagation(spoiled, codebook, temperature=T, mask=mask)
    assert out.codes[[0, 2, 5]].tolist() == [-1, -1, -1]
    assert not out.quantized[[0, 2]].any()
    assert out.quantized[5].isnan().all()
    assert not out.commitment_error[[0, 2]].any()
    good = mask.clone()
    good[5] = False
    dx, dcodebook = torch.autograd.grad(out.quantized[good].square().sum(), (spoiled, codebook))
    clean = x.detach()[good].requires_grad_()
    alone = vq.index_propagation(clean, codebook, temperature=T).quantized.square().sum()
    true_dx, true_dcodebook = torch.autograd.grad(alone, (clean, codebook))
    error = float32_error(x, codebook, "dot", T)
    assert_near(dx[good], true_dx.cpu().double(), error)
    assert_near(dcodebook, true_dcodebook.cpu().double(), error)
    assert not dx[~good].any()

"""Codes that are signs: closed forms against the general op and against the [N, 2^D] formulas."""

from __future__ import annotations

import math

import pytest
import torch
from quantizers import randn
from softmax_formulas import all_signs, clamped_entropy, entropy, llamagen_loss, logits
from torch import Tensor

import vqkernels as vq

D, T = 7, 0.9


def tokens(dtype: torch.dtype = torch.float64, n: int = 33, dim: int = D) -> Tensor:
    return randn(n, dim, seed=1).to(dtype).requires_grad_()


def closed(x: Tensor, **options) -> tuple[Tensor, ...]:
    return tuple(vq.sign_assignment(x, **options))


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_the_closed_form_is_the_softmax_over_all_signs(dim: int, scale: float):
    x = tokens(dim=dim)
    weight = torch.rand(33, dtype=torch.float64)
    mine = vq.sign_assignment(x, temperature=T, code_scale=scale, weight=weight)
    l = logits(x, all_signs(dim, scale), "euclidean", T)  # noqa: E741
    p = l.softmax(1)
    truth = l.logsumexp(1), entropy(p), weight @ p
    g = [randn(*value.shape, seed=2 + i).double() for i, value in enumerate(truth)]
    for i in range(3):
        torch.testing.assert_close(mine[i], truth[i], rtol=1e-12, atol=1e-12)
        a, b = (torch.autograd.grad((each[i] * g[i]).sum(), x, retain_graph=True)[0] for each in (mine, truth))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_and_the_general_op(dtype: torch.dtype):
    x = tokens(dtype)
    with vq.use_backend("reference"):
        general = vq.soft_assignment(x, all_signs(D).to(dtype), temperature=T)
    mine = vq.sign_assignment(x, temperature=T)
    for a, b in zip(mine, general, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.entropy.sum() + out.code_sums.square().sum(), x)[0] for out in (mine, general)]
    assert grads[0].dtype == dtype
    assert (grads[0] - grads[1]).norm() <= 2 * torch.finfo(dtype).eps ** (0.8 if dtype == torch.float32 else 1) * (
        grads[1].norm()
    )


def test_gradients_by_finite_differences():
    x = tokens(n=5, dim=4)
    weight = torch.rand(5, dtype=torch.float64)
    options = {"temperature": T, "code_scale": 0.7, "weight": weight}
    assert torch.autograd.gradcheck(lambda x: closed(x, **options), (x,))
    assert torch.autograd.gradcheck(lambda x: closed(x, group_size=2, **options), (x,))
    assert torch.autograd.gradcheck(lambda x: tuple(vq.sign_entropy_loss(x, eps=1e-3, **options)), (x,))


def test_groups_are_codebooks_of_their_own():
    x = tokens(dim=6)
    mine = vq.sign_assignment(x, temperature=T, group_size=2)
    assert mine.code_sums.shape == (3, 4)
    for group in range(3):
        p = logits(x[:, 2 * group : 2 * group + 2], all_signs(2), "euclidean", T).softmax(1)
        torch.testing.assert_close(mine.code_sums[group], p.sum(0))
    whole = vq.sign_assignment(x, temperature=T)
    torch.testing.assert_close(mine.entropy, whole.entropy)
    loss, exact = vq.sign_entropy_loss(x, temperature=T, group_size=2), vq.sign_entropy_loss(x, temperature=T)
    assert loss.batch_entropy > exact.batch_entropy  # independent groups: an upper bound


def test_as_exact_at_2_to_the_18_codes_as_the_whole_formula():
    """In float32, against all 262144 probabilities of each token in float64."""
    x = tokens(torch.float32, n=24, dim=18)
    mine = vq.sign_entropy_loss(x, temperature=2.0)
    x64 = x.detach().double().requires_grad_()
    p = (x64 @ all_signs(18).T).softmax(1)  # 2 x c / T
    truth = entropy(p).mean() - entropy(p.mean(0))
    mine.loss.backward()
    truth.backward()
    assert abs(mine.loss.item() - truth.item()) <= 1e-5 * abs(truth.item())
    assert (x.grad.double() - x64.grad).norm() <= 1e-5 * x64.grad.norm()


def test_open_magvit2():
    x = tokens()
    mine = vq.sign_entropy_loss(x, temperature=0.01, eps=1e-5)
    torch.testing.assert_close(mine.loss, llamagen_loss(2 * x @ all_signs(D).T))


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_of_vector_quantize_pytorch(spherical: bool):
    """Its formula; with its clamp lowered to the least probability, for that is all in which ours differs."""
    x, scale, inverse = tokens(dim=4), 0.8, 1.5
    x = torch.nn.functional.normalize(x, dim=1) * scale if spherical else x
    codes = all_signs(4, scale)
    codes = torch.nn.functional.normalize(codes, dim=1) * scale if spherical else codes
    p = (2 * x @ codes.T * inverse).softmax(1)
    least = p.min().item()
    truth = clamped_entropy(p, least).mean() - 0.7 * clamped_entropy(p.mean(0), least)
    size = scale / math.sqrt(4) if spherical else scale
    mine = vq.sign_entropy_loss(x, temperature=1 / inverse, code_scale=size, batch_weight=0.7)
    torch.testing.assert_close(mine.loss, truth)


def test_bsq():
    """Grouped, with analytic token entropies, times the inverse temperature that it divides by."""
    x = torch.nn.functional.normalize(tokens(dim=6), dim=1)
    inverse, gamma0, gamma = 20.0, 1.0, 0.8
    bit = torch.sigmoid(-4 * x / math.sqrt(6) * inverse)
    token = entropy(torch.stack([bit, 1 - bit], -1)).sum(-1).mean()
    groups = x.view(-1, 2, 3) @ (all_signs(3) / math.sqrt(6)).T  # [N, 2, 8]
    batch = entropy((2 * groups * inverse).softmax(-1).mean(0)).sum()
    mine = vq.sign_entropy_loss(
        x, temperature=1 / inverse, code_scale=6**-0.5, group_size=3, token_weight=gamma0, batch_weight=gamma
    )
    torch.testing.assert_close(mine.loss, gamma0 * token - gamma * batch)


def test_padding_bad_tokens_and_no_tokens():
    x = tokens(torch.float32)
    keep = torch.ones(33, dtype=torch.bool)
    keep[[0, 32]] = False
    spoiled = torch.where(keep[:, None], x.detach(), torch.nan).requires_grad_()
    clean = x.detach()[keep].requires_grad_()
    masked = vq.sign_entropy_loss(spoiled, temperature=T, weight=keep)
    alone = vq.sign_entropy_loss(clean, temperature=T)
    torch.testing.assert_close(masked.loss, alone.loss)
    dx = torch.autograd.grad(masked.loss, spoiled)[0]
    torch.testing.assert_close(dx[keep], torch.autograd.grad(alone.loss, clean)[0])
    assert not dx[~keep].any()
    bad = vq.sign_assignment(spoiled, temperature=T)
    assert bad.lse.isnan().tolist() == bad.entropy.isnan().tolist() == (~keep).tolist()
    torch.testing.assert_close(bad.code_sums, vq.sign_assignment(clean, temperature=T).code_sums)
    assert vq.sign_entropy_loss(x[:0]).loss == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 1e6])
def test_sharp_and_flat_extremes_stay_finite(temperature: float):
    x = tokens(torch.float32)
    loss = vq.sign_entropy_loss(x, temperature=temperature)
    assert loss.loss.isfinite()
    assert torch.autograd.grad(loss.loss, x)[0].isfinite().all()


def test_bitwise_the_same_on_every_run_and_thread_count():
    x = tokens(torch.float32, n=3000, dim=14)  # long enough for torch to share it out
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        loss = vq.sign_entropy_loss(x, temperature=1.0)
        results.append([loss.loss, *torch.autograd.grad(loss.loss, x)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- codes ----


def test_codes_and_rows_are_each_others_inverse():
    codes = torch.arange(1 << D)
    rows = vq.sign_rows(codes, D, code_scale=0.5, dtype=torch.float64)
    assert torch.equal(rows, all_signs(D, 0.5))
    assert torch.equal(vq.sign_codes(rows), codes)
    grouped = vq.sign_codes(rows[:, :6], group_size=3)
    assert grouped.shape == (1 << D, 2)
    assert torch.equal(vq.sign_rows(grouped, 6, group_size=3, code_scale=0.5, dtype=torch.float64), rows[:, :6])
    most = torch.full((1, 62), 1.0)
    assert vq.sign_codes(most).tolist() == [2**62 - 1]
    assert torch.equal(vq.sign_rows(vq.sign_codes(most), 62), most)


def test_codes_are_the_nearest_sign_vectors():
    x = tokens(torch.float32, n=200).detach()
    x[0] = 0
    x[1, 3] = torch.nan
    assert torch.equal(vq.sign_codes(x), vq.nearest(x, all_signs(D).float())[0])
    assert vq.sign_codes(x)[:2].tolist() == [0, -1]


BAD = {
    "dtype": (lambda x: vq.sign_codes(x.long()), "x: expected float32"),
    "group": (lambda x: vq.sign_codes(x, group_size=2), "group_size: expected a divisor of x's 7"),
    "too many bits": (lambda x: vq.sign_assignment(torch.zeros(2, 25)), "group_size: expected at most 24, got 25"),
    "temperature": (lambda x: vq.sign_entropy_loss(x, temperature=-1.0), "temperature: expected a positive"),
    "code_scale": (lambda x: vq.sign_entropy_loss(x, code_scale=0.0), "code_scale: expected a positive"),
    "weight": (lambda x: vq.sign_entropy_loss(x, weight=torch.ones(4)), "weight: expected bool or float"),
    "batch_weight": (lambda x: vq.sign_entropy_loss(x, batch_weight=-1.0), "batch_weight: expected >= 0"),
    "codes": (lambda x: vq.sign_rows(x, D), "codes: expected integers"),
    "groups": (lambda x: vq.sign_rows(torch.zeros(3, 2).long(), 6, group_size=2), r"codes: expected \[\.\.\., 3\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(5, D))


def test_rows_take_any_integer_in_range():
    codes = torch.arange(8)
    assert torch.equal(vq.sign_rows(codes.to(torch.uint8), 3), vq.sign_rows(codes, 3))
    with pytest.raises(IndexError, match=r"codes: expected in \[0, 8\)"):
        vq.sign_rows(codes + 1, 3)


def test_autocast_does_not_round_the_probabilities():
    x = randn(40, 6, seed=3).requires_grad_()

    def results() -> tuple[Tensor, ...]:
        sums = vq.sign_assignment(x).code_sums
        return sums, *torch.autograd.grad(sums.square().sum(), x)

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, rounded, strict=True))

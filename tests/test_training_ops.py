"""quantize, codebook_stats and ema_update_ compute their formulas, on every backend."""

from __future__ import annotations

import pytest
import torch
from formulas import code_sums, ema_step, quantize_gradients

import vqkernels as vq
from vqkernels.backends import use_backend
from vqkernels.ops._library import run
from vqkernels.testing import sum_tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _data(dtype: torch.dtype = torch.float32, n: int = 45, k: int = 21, d: int = 13, device: str = "cpu"):
    generator = torch.Generator().manual_seed(n + k + d)
    x = torch.randn(n, d, generator=generator).to(device, dtype)
    return x, torch.randn(k, d, generator=generator).to(device, dtype)


def _skip_float64(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels take no float64 (they say so: tests/test_nearest.py)")


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_are_bit_equal_and_keep_the_layout(backend, dtype: torch.dtype):
    name, device = backend
    _skip_float64(name, dtype)
    _, codebook = _data(dtype, device=device)
    image = torch.randn(2, 13, 5, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)  # [B, D, H, W]
    x = image.flatten(2).transpose(1, 2)  # [B, H*W, D], channels first in memory
    out = vq.quantize(x, codebook)
    assert out.quantized.stride() == x.stride()
    assert out.quantized.dtype == dtype
    assert torch.equal(out.quantized, codebook[out.codes])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    error = (x.to(wide) - out.quantized.to(wide)).square().sum(-1)
    torch.testing.assert_close(out.commitment_error, error, rtol=sum_tolerance(13, wide) / 13, atol=0)
    assert torch.equal(out.commitment_error, out.codebook_error)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_formulas(backend, dtype: torch.dtype, gradient: str):
    name, device = backend
    _skip_float64(name, dtype)
    x, codebook = (t.requires_grad_() for t in _data(dtype, device=device))
    g, weight = torch.randn(45, 13).to(dtype), torch.rand(45)
    out = vq.quantize(x, codebook, gradient=gradient)
    pieces = (out.quantized * g.to(device)).sum(), (out.commitment_error * weight.to(device)).sum()
    (sum(pieces) + (out.codebook_error * weight.to(device)).sum()).backward()
    expected = quantize_gradients(
        x.detach().cpu(), codebook.detach().cpu(), out.codes.cpu(), g, weight, gradient == "rotation"
    )
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2.0 * torch.finfo(dtype).eps)
    for mine, truth in zip((x.grad, codebook.grad), expected, strict=True):
        scale = truth.norm()
        assert (mine.cpu().double() - truth).norm() <= tolerance * scale


def test_rotation_turns_the_token_onto_the_code():
    """R e = q: the transpose of the gradient map applied to the token itself."""
    x, codebook = _data(torch.float64)
    codes, _ = vq.nearest(x, codebook)
    jacobian = torch.autograd.functional.jacobian(
        lambda token: vq.quantize(token[None], codebook, gradient="rotation").quantized[0], x[0]
    )
    torch.testing.assert_close(jacobian @ x[0], codebook[codes[0]])


def test_rotation_without_a_direction_falls_back(backend):
    _, device = backend
    codebook = torch.tensor([[0.0, 0.0], [3.0, 0.0]], device=device)
    x = torch.tensor([[0.1, 0.0], [0.0, 0.0], [4.0, 0.0]], device=device, requires_grad=True)
    vq.quantize(x, codebook, gradient="rotation").quantized.sum().backward()
    assert torch.equal(x.grad[:2].cpu(), torch.ones(2, 2))  # a zero code, a zero token: straight through
    torch.testing.assert_close(x.grad[2].cpu(), torch.tensor([0.75, 0.75]))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_rotation_at_any_scale(backend, scale: float):
    """The rotation does not depend on lengths, and |q| / |e| not on their common scale."""
    _, device = backend
    gradients = []
    for factor in (1.0, scale):
        x, codebook = (t * factor for t in _data(device=device))
        x.requires_grad_()
        g = torch.randn(45, 13, generator=torch.Generator().manual_seed(9)).to(device)
        (vq.quantize(x, codebook, gradient="rotation").quantized * g).sum().backward()
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_masked_and_non_finite_tokens(backend):
    _, device = backend
    x, codebook = _data(device=device)
    x[4, 2] = float("nan")
    x.requires_grad_()
    mask = torch.ones(45, dtype=torch.bool, device=device)
    mask[[0, 7]] = False
    out = vq.quantize(x, codebook, mask=mask)
    assert (out.codes[[0, 4, 7]] == -1).all()
    assert (out.codes[mask][torch.arange(43) != 3] >= 0).all()
    assert (out.quantized[[0, 7]] == 0).all()
    assert (out.commitment_error[[0, 7]] == 0).all()
    assert out.quantized[4].isnan().all()
    keep = torch.ones(45, dtype=torch.bool, device=device)
    keep[4] = False
    (out.quantized[keep].sum() + out.commitment_error[keep].sum()).backward()
    assert (x.grad[[0, 7]] == 0).all()
    assert x.grad[keep].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook_stats_are_counts_and_sums(backend, dtype: torch.dtype):
    name, device = backend
    _skip_float64(name, dtype)
    x, _ = _data(dtype, n=300, device=device)
    codes = torch.randint(-1, 20, (300,), generator=torch.Generator().manual_seed(1)).to(device)  # code 20 unused
    counts, sums = vq.codebook_stats(x, codes, 21)
    kept = codes >= 0
    truth = code_sums(x, codes, 21)
    assert torch.equal(counts.cpu().long(), torch.bincount(codes[kept].cpu(), minlength=21))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == counts.dtype == wide
    assert (sums.cpu().double() - truth).abs().max() <= sum_tolerance(300, wide, x.abs().max().item())


@pytest.mark.parametrize("skewed", [False, True])
def test_codebook_stats_are_bitwise_repeatable(backend, skewed: bool):
    _, device = backend
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(700, 6, generator=generator).to(device)
    codes = torch.randint(0, 2 if skewed else 50, (700,), generator=generator).to(device)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(vq.codebook_stats(x, codes, 50))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_crowd_does_not_drown_its_own_sum(backend):
    """200,000 tokens near 1000 with one code: a float32 sum in token order is off by 2e-3 here."""
    name, device = backend
    n = 20_000 if name == "triton" else 200_000
    x = torch.full((n, 1), 1000.0) + torch.rand(n, 1, generator=torch.Generator().manual_seed(4))
    _, sums = vq.codebook_stats(x.to(device), torch.zeros(n, dtype=torch.int64, device=device), 2)
    torch.testing.assert_close(sums[0].cpu().double(), x.double().sum(0), rtol=1e-6, atol=0)


def test_codebook_stats_of_maps_and_of_nothing(backend):
    _, device = backend
    image = torch.randn(2, 3, 4, 4).to(device)
    codes = torch.randint(0, 5, (2, 4, 4)).to(device)
    counts, sums = vq.codebook_stats(image.permute(0, 2, 3, 1), codes, 5)
    flat = vq.codebook_stats(image.permute(0, 2, 3, 1).contiguous(), codes, 5)
    assert torch.equal(counts, flat[0])
    assert torch.equal(sums, flat[1])
    counts, sums = vq.codebook_stats(image[:0, :, 0, 0], codes[:0, 0, 0], 5)
    assert counts.tolist() == [0] * 5
    assert (sums == 0).all()
    assert sums.shape == (5, 3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", ["plain", "revive", "idle", "idle-revive"])
def test_ema_update_is_the_formula(backend, case: str, normalize: bool):
    _, device = backend
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(37, 11, generator=generator)
    size = torch.rand(37, generator=generator) * 5
    state = [codebook, size, codebook * size[:, None]]
    counts = torch.randint(0, 4, (37,), generator=generator).float()
    sums = torch.randn(37, 11, generator=generator) * counts[:, None]
    revive = torch.zeros(37, dtype=torch.bool)
    if "idle" in case:
        counts.zero_(), sums.zero_()
    if "revive" in case:
        revive[[2, 30]], counts[[2, 30]], sums[[2, 30]] = True, 1.0, torch.randn(2, 11, generator=generator)
    expected = ema_step(state, counts, sums, revive, 0.9, 1e-5, normalize)
    mine = [t.clone().to(device) for t in state]
    vq.ema_update_(
        *mine,
        counts.to(device),
        sums.to(device),
        decay=0.9,
        revive=revive.to(device),
        revived_size=2.0,
        normalize=normalize,
    )
    for got, truth in zip(mine, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), truth, rtol=1e-5, atol=1e-6)
    if case == "idle":
        assert all(torch.equal(got.cpu(), old) for got, old in zip(mine, state, strict=True))


def test_ema_update_in_float64(backend):
    name, device = backend
    _skip_float64(name, torch.float64)
    codebook = torch.randn(5, 3, dtype=torch.float64)
    state = [codebook, torch.ones(5, dtype=torch.float64), codebook.clone()]
    counts, sums = torch.arange(5.0).double(), torch.randn(5, 3, dtype=torch.float64)
    none = torch.zeros(5, dtype=torch.bool)
    expected = ema_step(state, counts, sums, none, 0.99, 1e-5, False)
    mine = [t.clone().to(device) for t in state]
    vq.ema_update_(*mine, counts.to(device), sums.to(device), decay=0.99)
    for got, truth in zip(mine, expected, strict=True):
        torch.testing.assert_close(got.cpu(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "maps", "slice"])
def test_ema_step_is_statistics_and_update(backend, layout: str, dtype: torch.dtype, normalize: bool):
    """In one call and in two: the same bits, of the codes with many tokens, with one and with none."""
    name, device = backend
    _skip_float64(name, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(5)
    k, rest = (60, 20) if name == "triton" and device == "cpu" else (300, 100)  # the interpreter takes its time
    x = torch.randn(3, 100 + rest, 45, generator=generator).to(device, dtype)
    x = {"rows": x, "maps": x.transpose(1, 2).contiguous().transpose(1, 2), "slice": x[:, :, 1:38]}[layout]
    few = torch.randint(-1, 3, (3, 100), generator=generator)
    many = torch.randint(3, k, (3, rest), generator=generator)
    codes = torch.cat([few, many], dim=1).to(device)
    codebook, size = torch.randn(k, x.shape[2], generator=generator), torch.rand(k, generator=generator)
    state = [t.to(device, wide) for t in (codebook, size, codebook * size[:, None])]
    mine = [t.clone() for t in state]
    run("ema_step_", x, codes, *mine, 0.9, 1e-5, normalize)
    vq.ema_update_(*state, *vq.codebook_stats(x, codes, k), decay=0.9, normalize=normalize)
    assert all(torch.equal(a, b) for a, b in zip(mine, state, strict=True))
    run("ema_step_", x, torch.full_like(codes, -1), *mine, 0.9, 1e-5, normalize)
    assert all(torch.equal(a, b) for a, b in zip(mine, state, strict=True))  # nothing to learn from


@pytest.mark.parametrize("normalize", [False, True])
def test_plain_smoothing_divides_by_size_and_eps(backend, normalize: bool):
    _, device = backend
    codebook, size = torch.randn(9, 11), torch.rand(9) * 3
    state = [t.to(device) for t in (codebook, size, codebook * size[:, None])]
    counts, sums = torch.ones(9).to(device), torch.randn(9, 11).to(device)
    options = {"decay": 0.9, "eps": 0.25, "normalize": normalize}
    vq.ema_update_(*state, counts, sums, smoothing="plain", **options)
    mean = state[2].cpu().double() / (state[1].cpu().double() + 0.25)[:, None]
    expected = mean / mean.norm(dim=1, keepdim=True) if normalize else mean
    torch.testing.assert_close(state[0].cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_used_up_statistics_are_cleared_and_empty_rows_are_not_visited(backend):
    """What the modules call: as ema_update_, then zeros; also where half of the codes have no token."""
    _, device = backend
    codebook, size = torch.randn(30, 10), torch.rand(30)
    counts = torch.tensor([0.0, 2.0, 1.0]).repeat(10)
    sums, revive = torch.randn(30, 10) * counts[:, None], torch.arange(30) == 4
    ends = []
    for consume in (False, True):
        state = [t.clone().to(device) for t in (codebook, size, codebook * size[:, None])]
        pending = [t.clone().to(device) for t in (counts, sums, revive)]
        run("ema_update_", *state, *pending, 0.9, 1e-5, 2.0, False, False, consume)
        ends.append((state, pending))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ends[0][1], (counts, sums, revive), strict=True))
    assert not any(t.any() for t in ends[1][1])


@pytest.mark.parametrize("dim", [5, 21, 40, 70])
@pytest.mark.parametrize("first", [False, True], ids=["rows", "maps"])
def test_statistics_are_added_to_what_is_there(backend, first: bool, dim: int):
    _, device = backend
    x = (torch.randn(3, dim, 37).transpose(1, 2) if first else torch.randn(3, 37, dim)).to(device)
    codes = torch.randint(-1, 40, (3, 37)).to(device)
    counts, sums = vq.codebook_stats(x, codes, 50)
    start = torch.rand(50).to(device), torch.randn(50, dim).to(device)
    mine, alone = [t.clone() for t in start], start[0].clone()
    run("add_statistics_", x, codes, *mine)
    run("add_statistics_", x, codes, alone, None)
    assert torch.equal(mine[0], start[0] + counts)
    assert torch.equal(mine[1], start[1] + sums)
    assert torch.equal(alone, mine[0])


def test_many_codes_give_the_sums_of_few():
    """Tokens are sorted another way where codes are many: the order within a code is the same."""
    x, codes = torch.randn(300, 7), torch.randint(-1, 60, (300,))
    counts, sums = vq.codebook_stats(x, codes, 60)
    many = vq.codebook_stats(x, torch.where(codes < 0, codes, codes * 1000 + 17), 60_000)
    assert torch.equal(many[0][17::1000], counts)
    assert torch.equal(many[1][17::1000], sums)
    assert many[0].sum() == counts.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "d"), [(140_000, 9000, 3), (140_000, 11, 18), (9000, 200, 40), (300, 3, 1)])
def test_sums_have_the_same_bits_however_tokens_were_sorted(dtype: torch.dtype, n: int, k: int, d: int):
    """At once, in buckets by several threads, digit by digit (more codes), or not at all (a map's)."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator).to(dtype)
    x[:3] = -0.0
    codes = torch.randint(-1, k, (n,), generator=generator)
    roads = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        roads += [vq.codebook_stats(rows, codes, k) for rows in (x, x.T.contiguous().T)]
    roads.append([each[:k] for each in vq.codebook_stats(x, codes, 5 * n)])
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    for counts, sums in roads[1:]:
        assert torch.equal(counts, roads[0][0])
        assert torch.equal(sums.contiguous().view(bits), roads[0][1].view(bits))
    torch.testing.assert_close(roads[0][1].double(), code_sums(x.double(), codes, k), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_code_past_the_codebook_is_refused_before_anything_is_written(threads: int):
    torch.set_num_threads(threads)
    codes = torch.zeros(1, 140_000, dtype=torch.int64)
    codes[0, 90_000] = 9
    counts, sums = torch.zeros(9), torch.zeros(9, 1)
    with pytest.raises(ValueError, match="below codebook_size = 9, got 9"), use_backend("compiled"):
        run("add_statistics_", torch.ones(1, 140_000, 1), codes, counts, sums)
    assert not counts.any()
    assert not sums.any()


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["rows", "maps"])
def test_absent_gradients_are_zeros_and_masked_tokens_get_none(backend, first: bool, rotation: bool):
    _, device = backend
    shape = (2, 19, 35) if first else (2, 35, 19)
    x, q, g = (t.transpose(1, 2) if first else t for t in torch.randn(3, *shape).to(device))
    codes, error = torch.randint(-1, 9, (2, 35)).to(device), torch.rand(2, 35).to(device)
    mask = (torch.rand(2, 35) > 0.4).to(device)
    zeros, nothing = torch.zeros_like(x), torch.zeros_like(error)
    for absent, present in (
        ((None, error), (zeros, error)),
        ((g, None), (g, nothing)),
        ((None, None), (zeros, nothing)),
    ):
        dx = run("quantize_backward", x, q, codes, *absent, rotation, mask)
        truth = run("quantize_backward", x, q, codes, *present, rotation, None)
        torch.testing.assert_close(dx, torch.where(mask[..., None], truth, 0.0))
        assert dx.stride() == x.stride()


def test_rotation_of_nearly_opposite_directions(backend):
    """|u + v|^2 would cancel in products of the rows; summed term by term it does not."""
    name, device = backend
    x = torch.randn(40, 24, dtype=torch.float64)
    off = torch.randn(40, 24, dtype=torch.float64)
    bend = 10.0 ** -torch.linspace(0, 4 if name != "triton" else 1.5, 40, dtype=torch.float64)
    q = -1.3 * x + bend[:, None] * off
    x, q, g = (t.float() for t in (x, q, torch.randn_like(x)))
    codes = torch.arange(40)[None].to(device)
    dx = run("quantize_backward", *(t[None].to(device) for t in (x, q)), codes, g[None].to(device), None, True, None)
    truth, _ = quantize_gradients(x, q, torch.arange(40), g, torch.zeros(40), True)
    assert (dx[0].cpu().double() - truth).norm() <= (1e-4 if name == "triton" else 1e-6) * truth.norm()


@pytest.mark.parametrize("first", [False, True], ids=["rows", "maps"])
def test_codebook_gradient_for_any_number_of_threads(first: bool):
    shape = (4, 40, 700) if first else (4, 700, 40)
    x, q = (t.transpose(1, 2) if first else t for t in torch.randn(2, *shape))
    codes, error = torch.randint(-1, 50, (4, 700)), torch.rand(4, 700)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run("codebook_gradient", x, q, codes, error, 60))
    rows = run("codebook_gradient", x.contiguous(), q.contiguous(), codes, error, 60)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], rows)
    kept = codes >= 0
    pull = 2 * error[kept][:, None].double() * (q - x)[kept].double()
    truth = code_sums(pull, codes[kept], 60)
    assert (rows.double() - truth).abs().max() <= sum_tolerance(200, torch.float32, pull.abs().max().item())


BAD = {
    "mask shape": (
        lambda x, c: vq.quantize(x, c, mask=torch.ones(3, dtype=torch.bool)),
        "mask: expected bool",
    ),
    "gradient": (lambda x, c: vq.quantize(x, c, gradient="ste"), "gradient: expected one of"),
    "codes dtype": (
        lambda x, c: vq.codebook_stats(x, torch.zeros(5, dtype=torch.int32), 6),
        "codes: expected int64",
    ),
    "codes shape": (
        lambda x, c: vq.codebook_stats(x, torch.zeros(4, dtype=torch.int64), 6),
        "codes: expected int64",
    ),
    "codes range": (lambda x, c: vq.codebook_stats(x, torch.full((5,), 6), 6), "codes"),
    "sums": (
        lambda x, c: vq.ema_update_(c, c[:, 0].clone(), c, c[:, 0].clone(), c[1:], decay=0.9),
        "sums: expected",
    ),
    "decay": (
        lambda x, c: vq.ema_update_(c, c[:, 0].clone(), c, c[:, 0].clone(), c, decay=1.5),
        "decay: expected",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))


def test_lookup_inverts_nearest_and_checks_its_codes():
    x, codebook = _data()
    codes, _ = vq.nearest(x, codebook)
    assert torch.equal(vq.lookup(codes, codebook), vq.quantize(x, codebook).quantized)
    with pytest.raises(IndexError, match=r"codes: expected in \[0, 21\), got values from -1 to 20"):
        vq.lookup(torch.tensor([-1, 20]), codebook)
    with pytest.raises(TypeError, match="codes: expected integers"):
        vq.lookup(torch.tensor([0.5]), codebook)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_a_second_derivative_is_refused(gradient: str):
    """It would lack what depends on the tokens: an error, also where the gradient that comes in is a number."""
    z, codebook = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    weight = torch.tensor(1.5, requires_grad=True)
    for take in (lambda out: out.commitment_error.mean(), lambda out: out.quantized.square().sum()):
        (slope,) = torch.autograd.grad(take(vq.quantize(weight * z, codebook, gradient=gradient)), z, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            slope.square().sum().backward()
    loss = vq.code_cross_entropy(weight * z, codebook, torch.zeros(6, dtype=torch.int64))
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        slope.square().sum().backward()

"""nearest returns the true nearest code, on every backend, however the work is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adversarial import Case, cases, large_cases, ragged_cases, true_nearest
from requirements import skip_or_fail

import vqkernels as vq
from vqkernels._extension import cpu_library, instruction_set
from vqkernels.kernels.compiled import nearest_report

HALF = (torch.float16, torch.bfloat16)
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


def _takes(backend: str, dtype: torch.dtype) -> bool:
    return not (backend == "triton" and dtype == torch.float64)


@pytest.mark.parametrize(("metric", "case"), ALL, ids=lambda value: str(value))
def test_codes_and_distances_are_the_true_ones(backend, metric: str, case: Case):
    name, device = backend
    if not _takes(name, case.x.dtype):
        with pytest.raises(vq.BackendError, match="float64"):
            vq.nearest(case.x.to(device), case.codebook.to(device), metric=metric)
        return
    codes, distance = vq.nearest(case.x.to(device), case.codebook.to(device), metric=metric)
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    assert torch.equal(codes.cpu(), true)
    if name != "triton" or device == "cuda":  # the interpreter takes its time, and has no threads
        codebook = case.codebook.to(device)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parts = [vq.nearest(x.to(device), codebook, metric=metric)[0] for x in case.x.tensor_split(3)]
            assert torch.equal(torch.cat(parts).cpu(), true)
    absolute = 2.0**-46 if metric == "cosine" else 0.0  # 1 - cos cancels: float64's error of a cosine stays
    torch.testing.assert_close(distance.cpu(), true_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("case", large_cases(), ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_thousands_of_codes_on_every_instruction_set(monkeypatch, isa: str, case: Case, metric: str):
    """What is too large for an interpreter: compiled only, each coarse pass, one and two threads, in pieces."""
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    monkeypatch.setenv("VQKERNELS_CPU_ISA", isa)
    if instruction_set() != isa:
        skip_or_fail(isa, f"this CPU has no {isa}")
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    absolute = 2.0**-46 if metric == "cosine" else 0.0
    ways = (("int16", 1, 1), ("float32", 2, 1), ("int8", 2, 1), ("byte", 1, 1))
    ways += (("int16", 2, 3), ("float32", 1, 3), ("int8", 1, 3), ("byte", 2, 3))
    for coarse_pass, threads, pieces in ways:
        monkeypatch.setenv("VQKERNELS_CPU_PASS", coarse_pass)
        torch.set_num_threads(threads)
        with vq.use_backend("compiled"):
            parts = [vq.nearest(x, case.codebook, metric=metric) for x in case.x.tensor_split(pieces)]
        assert torch.equal(torch.cat([codes for codes, _ in parts]), true)
        distance = torch.cat([distance for _, distance in parts])
        torch.testing.assert_close(distance, true_distance, rtol=2.0**-23, atol=absolute, equal_nan=True)


def test_codes_do_not_depend_on_threads_or_batch_split(backend):
    name, device = backend
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37 if name == "triton" else 301, 18, generator=generator)
    codebook = torch.randn(150, 18, generator=generator)
    codebook[75:] = codebook[:75] * (1 + 2.0**-22)  # near-ties all over
    true, _ = true_nearest(x, codebook)
    for threads, pieces in ((1, 1), (2, 1), (2, 3)):
        torch.set_num_threads(threads)
        parts = [vq.nearest(part.to(device), codebook.to(device))[0].cpu() for part in x.tensor_split(pieces)]
        assert torch.equal(torch.cat(parts), true)


def test_any_strides_and_leading_shape(backend):
    _, device = backend
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 8, 5, 7, generator=generator)  # [B, D, H, W]
    wide = torch.randn(24, 16, generator=generator)
    codebook = wide[::2, ::2]  # strided both ways
    x = image.permute(0, 2, 3, 1)  # [B, H, W, D] without a copy
    codes, distance = vq.nearest(x.to(device), codebook.to(device))
    true, _ = true_nearest(x.reshape(-1, 8), codebook)
    assert codes.shape == distance.shape == (2, 5, 7)
    assert torch.equal(codes.cpu().flatten(), true)
    one, _ = vq.nearest(x[1, 2, 3].to(device), codebook.to(device))
    assert one.shape == ()
    assert one.item() == codes[1, 2, 3].item()
    expanded = x[:1, :1, :1].expand(3, 2, 2, 8)  # stride 0
    assert (vq.nearest(expanded.to(device), codebook.to(device))[0] == codes[0, 0, 0]).all()


@pytest.mark.parametrize("dtype", HALF)
def test_half_tokens_against_a_float32_codebook(backend, dtype: torch.dtype):
    _, device = backend
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(33, 20, generator=generator).to(dtype)
    codebook = torch.randn(70, 20, generator=generator)
    codes, _ = vq.nearest(x.to(device), codebook.to(device))
    assert torch.equal(codes.cpu(), true_nearest(x.float(), codebook)[0])


def test_autocast_changes_nothing(backend):
    _, device = backend
    case = ragged_cases()[5]
    with torch.autocast(device, dtype=torch.bfloat16):
        codes, _ = vq.nearest(case.x.to(device), case.codebook.to(device))
    assert torch.equal(codes.cpu(), true_nearest(case.x, case.codebook)[0])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fast_is_near_and_obeys_the_same_rules(backend, metric: str):
    _, device = backend
    generator = torch.Generator().manual_seed(3)
    x, codebook = torch.randn(64, 16, generator=generator), torch.randn(100, 16, generator=generator)
    x[5, 3] = float("nan")
    codes, distance = vq.nearest(x.to(device), codebook.to(device), metric=metric, precision="fast")
    true, true_distance = true_nearest(x, codebook, metric)
    assert codes[5].item() == -1
    assert distance[5].isnan()
    # float32 scores of D = 16 terms: the chosen code is no farther than its rounding
    torch.testing.assert_close(distance.cpu(), true_distance, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (codes.cpu() == true).float().mean() > 0.95


def test_non_finite_codebook_is_reported(backend):
    _name, device = backend
    codebook = torch.randn(9, 4, device=device)
    codebook[3, 2] = float("nan")
    x = torch.randn(5, 4, device=device)
    if device == "cpu":
        with pytest.raises((ValueError, RuntimeError), match="codebook"):
            vq.nearest(x, codebook)
    else:
        codes, distance = vq.nearest(x, codebook)
        assert (codes == -1).all()
        assert distance.isnan().all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 4)])
def test_a_diverged_codebook_is_reported_however_large(metric: str, columns: slice):
    """Every code holds a NaN, and few tokens meet many codes: the codebook is then read piece by piece."""
    codebook = torch.randn(40_000, 64)
    codebook[:, columns] = float("nan")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="codebook: expected finite values"):
            vq.nearest(torch.randn(4, 64), codebook, metric=metric)


@pytest.mark.parametrize(("size", "dim"), [(40, 7), (33, 5), (300, 257)])
def test_no_change_of_a_kept_codebook_goes_unseen(size: int, dim: int):
    """The C++ kernels keep a prepared codebook until its numbers change: any bit of any of them, or their order."""
    if (reason := cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    x, codebook = torch.randn(1, 2, dim), torch.randn(size, dim)
    bits = codebook.view(-1).view(torch.int32).numpy()  # torch's version counter does not see writes to it

    def kept() -> bool:
        return nearest_report(x, codebook, "euclidean", "exact").prepared_from_cache

    def check(places: list[int], values: np.ndarray) -> None:
        assert [kept(), kept(), kept()][2]  # the codebook as it was
        before = bits[places]
        bits[places] = values
        assert not kept(), (places, before, values)
        bits[places] = before

    masks = np.array([1, 2, 1 << 23, -(2**31)], dtype=np.int32)  # of mantissa, exponent and sign
    for i in torch.randperm(bits.size - 32, generator=torch.Generator().manual_seed(0))[:50].tolist():
        for mask in masks:
            check([i], bits[[i]] ^ mask)
        for other in (i + 1, i + 2, i + 16, i + 31):  # neighbours, and what a vector holds in one lane
            check([i, other], bits[[other, i]])
            check([i, other], bits[[i, other]] + np.array([1, -1], dtype=np.int32))  # their sum stays
    check([bits.size - 1], bits[-1:] ^ masks[:1])


BAD = {
    "wrong dim": (
        lambda x, c: vq.nearest(x[:, :3], c),
        ValueError,
        r"x: expected \[\.\.\., 4\].*got \[5, 3\]",
    ),
    "rank": (lambda x, c: vq.nearest(x, c[0]), ValueError, r"codebook: expected \[K, D\].*got shape \[4\]"),
    "no codes": (lambda x, c: vq.nearest(x, c[:0]), ValueError, "codebook: expected"),
    "dtype pair": (
        lambda x, c: vq.nearest(x, c.half()),
        TypeError,
        "codebook: expected torch.float32 like x",
    ),
    "integers": (lambda x, c: vq.nearest(x.long(), c), TypeError, "x: expected float32.*got torch.int64"),
    "device": (
        lambda x, c: vq.nearest(x, c.to("meta")),
        ValueError,
        "codebook: expected on cpu like x, got meta",
    ),
    "metric": (lambda x, c: vq.nearest(x, c, metric="l1"), ValueError, "metric: expected one of .*got 'l1'"),
    "precision": (lambda x, c: vq.nearest(x, c, precision="tf32"), ValueError, "precision: expected one of"),
    "not a tensor": (lambda x, c: vq.nearest([1.0], c), TypeError, "x: expected a torch.Tensor, got list"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))


def test_offsets_past_two_to_the_31(backend, tmp_path):
    """Three tokens 2^30 elements apart: the last one lies past what 32 bits can address."""
    _name, device = backend
    stride = 2**30 + 4
    size = 2 * stride + 8
    if device == "cpu":  # a sparse file: 8.6 GB of addresses, three pages of memory
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size)
    else:
        memory = torch.empty(size, device=device)
    x = memory.as_strided((3, 1, 8), (stride, 8, 1))
    codebook = torch.eye(8, device=device)
    x.copy_(codebook[[5, 2, 7], None])
    assert vq.nearest(x, codebook)[0].flatten().tolist() == [5, 2, 7]
    quantized = vq.quantize(x, codebook).quantized
    assert torch.equal(quantized, x)

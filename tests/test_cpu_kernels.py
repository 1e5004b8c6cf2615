"""The C++ kernels, called directly: every instruction set, thread count and batch split gives the same true answer."""

from __future__ import annotations

import pytest
import torch
from adversarial import Case, cases, true_nearest
from formulas import code_sums
from instruction_sets import library as library
from instruction_sets import use_instruction_set
from torch import Tensor

from vqkernels import explain
from vqkernels.kernels import compiled

pytestmark = pytest.mark.usefixtures("library")
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_instruction_set(request.param, monkeypatch)
    return request.param


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _codes(n: int, size: int, seed: int) -> Tensor:
    return torch.randint(-1, size, (1, n), generator=torch.Generator().manual_seed(seed))


def _search(x: Tensor, codebook: Tensor, metric: str, pieces: int = 1) -> tuple[Tensor, Tensor]:
    parts = [compiled.nearest(part[None], codebook, metric, "exact") for part in x.tensor_split(pieces)]
    return torch.cat([codes[0] for codes, _ in parts]), torch.cat([distance[0] for _, distance in parts])


# ------------------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_nearest_is_true_on_every_instruction_set(instruction_set: str, metric: str, case: Case):
    true, true_distance = true_nearest(case.x, case.codebook, metric)
    absolute = 2.0**-46 if metric == "cosine" else 0.0  # 1 - cos cancels: float64's error of a cosine stays
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for pieces in (1, 4):
            codes, distance = _search(case.x, case.codebook, metric, pieces)
            assert torch.equal(codes, true)
            torch.testing.assert_close(distance, true_distance, rtol=2.0**-23, atol=absolute, equal_nan=True)


@pytest.mark.parametrize(("n", "size", "dim"), [(5, 70000, 3), (700, 4100, 8), (64, 3000, 200), (130, 200, 18)])
def test_work_split_over_tokens_or_codes_changes_nothing(instruction_set: str, n: int, size: int, dim: int):
    x, codebook = _randn(n, dim, seed=n), _randn(size, dim, seed=size)
    codebook[size // 2 :] = codebook[: size - size // 2]  # a true tie for every token, far apart
    squares = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = squares.argmin(1) % (size // 2)  # no other ties in this data
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for pieces in (1, 3):
            assert torch.equal(_search(x, codebook, "euclidean", pieces)[0], expected)


@pytest.mark.parametrize("coarse_pass", ["byte", "int8", "int16", "float32"])
@pytest.mark.parametrize(
    ("n", "size", "dim"), [(60, 5000, 8), (40, 300, 33), (50, 2500, 96), (70, 2500, 65), (13, 70, 1)]
)
def test_every_coarse_pass_and_granule_gives_the_same_codes(
    instruction_set: str, monkeypatch: pytest.MonkeyPatch, coarse_pass: str, n: int, size: int, dim: int
):
    monkeypatch.setenv("VQKERNELS_CPU_PASS", coarse_pass)
    x, codebook = _randn(n, dim, seed=31), _randn(size, dim, seed=32)
    for metric in ("euclidean", "cosine"):
        report = compiled.nearest_report(x[None], codebook, metric, "exact")
        had = instruction_set != "portable" or coarse_pass in ("byte", "int8")  # with plain loops to test them anywhere
        assert report.coarse_pass == (coarse_pass if had else "float32")
        assert torch.equal(report.codes[0], true_nearest(x, codebook, metric)[0])
        assert report.scanned == n or report.candidates >= 1  # in one dimension every cosine is a tie


def _pull(codebook: Tensor, code: Tensor, target: Tensor) -> None:
    codebook[code] = target


WRITES = {
    "in place": _pull,
    ".data": lambda codebook, code, target: _pull(codebook.data, code, target),  # the version counter sees neither
    "numpy": lambda codebook, code, target: codebook.numpy().__setitem__(int(code), target.numpy()),  # of these two
}


@pytest.mark.parametrize("write", WRITES)
def test_a_prepared_codebook_is_never_stale(instruction_set: str, write: str):
    seed = 50 + 3 * INSTRUCTION_SETS.index(instruction_set) + list(WRITES).index(write)  # numbers not seen before
    x, codebook = _randn(50, 24, seed=seed), _randn(600, 24, seed=seed + 50)

    def search() -> compiled.SearchReport:
        return compiled.nearest_report(x[None], codebook, "euclidean", "exact")

    before = search().codes[0]
    assert search().prepared_from_cache
    far = int((before != before[0]).nonzero()[0])  # a token with another code, which is about to lie on token 0
    WRITES[write](codebook, before[far], x[0])
    report = search()
    assert not report.prepared_from_cache
    assert report.codes[0, 0] == before[far]
    assert torch.equal(report.codes[0], true_nearest(x, codebook, "euclidean")[0])


def test_flipped_signs_do_not_cancel_in_the_fingerprint():
    """A column of signs beside a constant: under evenly spaced keys these two patterns have the same sums."""
    codebook = 0.1 * _randn(16, 16, seed=41)
    codebook[:, 1] = 1.0
    for pattern in (0x3E32, 0x9CB2):
        codebook[:, 0] = torch.tensor([-1.0 if pattern >> i & 1 else 1.0 for i in range(16)])
        report = compiled.nearest_report(codebook[None], codebook, "euclidean", "exact")
        assert not report.prepared_from_cache
        assert report.codes[0].tolist() == list(range(16))


def test_codes_that_underflow_after_scaling_are_in_the_bound(instruction_set: str):
    """Codes near 2^-128 of the scale, and a token long enough for what float32 drops of them to decide."""
    dim, some, unit = 6400, slice(2048, 6144), 2.0**-128
    codebook = torch.zeros(17, dim)
    codebook[0, some] = 2.49 * unit
    codebook[1, some] = torch.tensor([2.51, 1.51]).repeat(2048) * unit
    codebook[2:4] = -codebook[:2]
    for i in range(3):
        codebook[8 + 2 * i, i], codebook[9 + 2 * i, i] = 2.0**20, -(2.0**20)
    codebook[14:17, 10] = torch.tensor([1.0, 1.0, -2.0]) * 2.0**20
    x = torch.zeros(1, dim)
    x[0, some] = 1.9 * 2.0**54
    assert compiled.nearest(x[None], codebook, "euclidean", "exact")[0].item() == 0


def test_dead_codes_at_one_point_do_not_send_tokens_to_the_scan():
    live = _randn(3000, 64, seed=42)
    codebook = torch.cat([torch.zeros(200, 64), live])
    x = live[:500] + 0.1 * _randn(500, 64, seed=43)
    report = compiled.nearest_report(x[None], codebook, "euclidean", "exact")
    assert report.scanned == 0
    assert report.codes[0].tolist() == list(range(200, 700))


def test_a_codebook_written_back_and_forth_is_prepared_anew_each_time():
    x, codebook = _randn(20, 5, seed=35), _randn(90, 5, seed=36)
    for value in (0.0, 1.0, 0.0, 1.0):
        codebook[3, 2] = value
        report = compiled.nearest_report(x[None], codebook, "euclidean", "exact")
        assert torch.equal(report.codes[0], true_nearest(x, codebook, "euclidean")[0])


def _outlier(codebook: Tensor) -> Tensor:
    codebook[7] *= 1e20
    return codebook


HARD = {
    "all codes equal": lambda c: c[:1].expand_as(c).contiguous(),
    "zero": torch.zeros_like,
    "near-duplicates": lambda c: c[:4].repeat_interleave(len(c) // 4, 0) + 1e-6 * c,
    "one far outlier": _outlier,
    "mixed scales": lambda c: c * torch.logspace(-12, 12, len(c))[:, None],
}


@pytest.mark.parametrize("name", HARD)
def test_hard_codebooks_are_exact_and_few_tokens_scan_for_an_outlier(instruction_set: str, name: str):
    x, codebook = _randn(90, 8, seed=37), HARD[name](_randn(2400, 8, seed=38))
    report = compiled.nearest_report(x[None], codebook, "euclidean", "exact")
    assert torch.equal(report.codes[0], true_nearest(x, codebook, "euclidean")[0])
    if name == "one far outlier":
        assert report.scanned == 0  # it has a scale of its own
        assert report.candidates < 3


def test_explain_names_the_coarse_pass(monkeypatch: pytest.MonkeyPatch, instruction_set: str):
    x, codebook = _randn(4, 8, seed=39), _randn(9, 8, seed=40)
    assert ("int16 pass" in explain("nearest", x, codebook)) == (instruction_set != "portable")
    assert 'precision="fast"' in explain("nearest", x, codebook, "euclidean", "fast")
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "float32")
    assert f"float32 pass ({instruction_set}): VQKERNELS_CPU_PASS=float32" in explain("nearest", x, codebook)


def test_a_coarse_pass_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VQKERNELS_CPU_PASS", "int4")
    with pytest.raises(RuntimeError, match="VQKERNELS_CPU_PASS: expected byte, int8, int16 or float32, got int4"):
        compiled.nearest(_randn(4, 8, seed=39)[None], _randn(9, 8, seed=40), "euclidean", "exact")


def test_peak_rates_are_measured():
    one = compiled.peak_rates(1)
    assert one["float32"] > 1e8
    assert one["int16"] == 0 or one["int16"] > 1e8
    assert one["int8"] == 0 or one["int8"] > 1e8
    assert one["byte"] == 0 or one["byte"] > 1e8


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_crowds_of_ties_take_the_lowest_index(instruction_set: str, metric: str):
    """More tied codes than the fast pass keeps, in two alternating kinds that mirror each other."""
    side = torch.zeros(600, 6)
    side[::2, 0], side[1::2, 0] = -0.3, 0.3
    side[:, 1:] = 0.7
    side[:5, 1:] = 9.0
    side[:5, 0] = -50.0
    x = torch.cat([torch.zeros(40, 1), torch.full((40, 5), 0.69)], dim=1)
    codes, _ = _search(x, side, metric)
    assert (codes == 5).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_strides_and_element_types(instruction_set: str, metric: str):
    for dtype in DTYPES:
        image = _randn(3, 10, 7, 5, seed=1, dtype=dtype)  # [B, D, H, W]
        x = image.flatten(2).transpose(1, 2)  # [B, T, D], stride 1 along T
        codebook = _randn(40, 20, seed=2, dtype=dtype).T[::2].T  # [40, 10], strided both ways
        true, _ = true_nearest(x.reshape(-1, 10), codebook, metric)
        for tokens in (x, x.contiguous(), x.flip(1).contiguous().flip(1)):
            codes, distance = compiled.nearest(tokens, codebook, metric, "exact")
            assert torch.equal(codes.flatten(), true)
            assert codes.shape == distance.shape == x.shape[:2]


def test_subnormals_count_even_where_the_caller_flushes_them():
    (case,) = [case for case in cases("euclidean") if case.name == "subnormal"]
    true, _ = true_nearest(case.x, case.codebook)
    torch.set_flush_denormal(True)
    try:
        codes, _ = _search(case.x, case.codebook, "euclidean")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(codes, true)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_codebook_that_is_not_finite_is_an_error(dtype: torch.dtype, value: float):
    codebook = _randn(300, 6, seed=3, dtype=dtype)
    codebook[211, 4] = value
    for metric in ("euclidean", "cosine"):
        with pytest.raises(ValueError, match="codebook: expected finite values"):
            compiled.nearest(torch.zeros(1, 2, 6, dtype=dtype), codebook, metric, "exact")


# ------------------------------------------------------------------------- gather, gradient, statistics


def _layouts(x: Tensor) -> list[Tensor]:
    """The same tokens, row-major, channels-first and as a slice of something wider."""
    wide = torch.full((*x.shape[:2], 2 * x.shape[2]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return [
        x,
        x.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_copies_rows_and_measures_the_error(dtype: torch.dtype):
    codebook = _randn(11, 30, seed=6, dtype=dtype)
    codes = _codes(2 * 37, 11, seed=7).view(2, 37)
    for x in _layouts(_randn(2, 37, 30, seed=8, dtype=dtype)):
        for book in (codebook, codebook.T.contiguous().T):
            quantized, error = compiled.gather(x, book, codes)
            assert quantized.stride() == torch.empty_like(x).stride()
            kept = codes >= 0
            assert torch.equal(quantized[kept], codebook[codes[kept]])
            assert quantized[~kept].isnan().all()
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            true = (x.double() - quantized.double()).square().sum(-1).to(wide)
            torch.testing.assert_close(error, true, rtol=30 * torch.finfo(wide).eps, atol=0, equal_nan=True)


def _rotated(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """The rotation trick's vector-Jacobian product, in float64."""
    u, v = x / x.norm(dim=-1, keepdim=True), q / q.norm(dim=-1, keepdim=True)
    w = torch.nn.functional.normalize(u + v, dim=-1)
    turned = g - 2 * (g * w).sum(-1, keepdim=True) * w + 2 * (g * v).sum(-1, keepdim=True) * u
    return turned * q.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", [False, True])
def test_backward_is_the_formula(dtype: torch.dtype, rotation: bool):
    x, codebook = _randn(2, 21, 19, seed=9, dtype=dtype), _randn(12, 19, seed=10, dtype=dtype)
    codes = _codes(42, 12, seed=11).view(2, 21)
    x[0, 0], codes[0, 0] = 0, 3  # a zero token: straight-through
    codebook[4], codes[0, 1] = 0, 4  # a zero code: straight-through
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, derror = _randn(2, 21, 19, seed=12, dtype=dtype), _randn(2, 21, seed=13, dtype=wide)
    x64, q64, g64 = x.double(), codebook[codes.clamp_min(0)].double(), g.double()
    plain = (x64.norm(dim=-1) == 0) | (q64.norm(dim=-1) == 0)
    pulled = torch.where(plain[..., None], g64, _rotated(x64, q64, g64)) if rotation else g64
    true = torch.where(codes[..., None] < 0, g64, pulled + 2 * derror[..., None].double() * (x64 - q64))
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 2.0**-48
    for layout, gradient in zip(_layouts(x), reversed(_layouts(g)), strict=True):
        quantized, _ = compiled.gather(layout, codebook, codes)
        dx = compiled.quantize_backward(layout, quantized, codes, gradient, derror, rotation)
        assert dx.dtype == dtype
        assert dx.stride() == torch.empty_like(layout).stride()
        torch.testing.assert_close(dx.double(), true, rtol=4 * rounding, atol=32 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_sums_whose_bits_never_change(dtype: torch.dtype):
    size, x = 23, _randn(3, 400, 17, seed=14, dtype=dtype)
    codes = _codes(1200, size, seed=15).view(3, 400)
    kept = codes >= 0
    result = torch.float64 if dtype == torch.float64 else torch.float32
    true = code_sums(x, codes, size)
    first = None
    for layout in _layouts(x):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            counts, sums = compiled.codebook_stats(layout, codes, size)
            first = (counts, sums) if first is None else first
            assert counts.dtype == sums.dtype == result
            assert torch.equal(counts, first[0])
            assert torch.equal(sums, first[1])
    assert torch.equal(first[0], codes[kept].bincount(minlength=size).to(result))
    torch.testing.assert_close(first[1].double(), true, rtol=torch.finfo(result).eps, atol=1e-12)


def _moved(state: dict[str, Tensor], decay: float, eps: float, revived: float, normalize: bool) -> dict[str, Tensor]:
    """One step of the moving average in float64."""
    s = {name: value if value.dtype == torch.bool else value.double() for name, value in state.items()}
    revive, sampled = s["revive"], s["sums"]
    if normalize:
        sampled = torch.nn.functional.normalize(sampled, dim=1)
    size = torch.where(revive, revived, decay * s["cluster_size"] + (1 - decay) * s["counts"])
    moved = decay * s["embed_sum"] + (1 - decay) * s["sums"]
    moved = torch.where(revive[:, None], sampled * revived, moved)
    smoothed = (size + eps) / (size.sum() + len(size) * eps) * size.sum()
    rows = moved / smoothed[:, None]
    rows = torch.nn.functional.normalize(rows, dim=1) if normalize else rows
    return {
        "codebook": torch.where(revive[:, None], sampled, rows),
        "cluster_size": size,
        "embed_sum": moved,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_ema_update_is_the_formula(dtype: torch.dtype, normalize: bool):
    size, dim = 37, 9
    state = {
        name: _randn(size, dim, seed=16 + i, dtype=dtype) for i, name in enumerate(("codebook", "embed_sum", "sums"))
    }
    state |= {name: _randn(size, seed=20 + i, dtype=dtype).abs() for i, name in enumerate(("cluster_size", "counts"))}
    state["revive"] = torch.arange(size) % 5 == 0
    true = _moved(state, 0.9, 1e-5, 2.0, normalize)
    order = ("codebook", "cluster_size", "embed_sum", "counts", "sums", "revive")
    compiled.ema_update_(*(state[name] for name in order), 0.9, 1e-5, 2.0, normalize)
    for name, value in true.items():
        torch.testing.assert_close(state[name].double(), value, rtol=8 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("dim", [3, 8, 15, 18, 29, 40, 47, 50, 64, 65, 96])
def test_the_training_kernels_give_the_same_bits_on_every_instruction_set(
    instruction_set: str, monkeypatch: pytest.MonkeyPatch, dim: int
):
    def results() -> list[Tensor]:
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, g = _randn(2, 70, dim, seed=1).to(dtype), _randn(2, dim, 70, seed=2).to(dtype).transpose(1, 2)
            book, codes = _randn(40, dim, seed=3).to(dtype), torch.arange(140).view(2, 70) * 7 % 41 - 1
            quantized, error = compiled.gather(x, book, codes)
            counts, sums = compiled.codebook_stats(x, codes, 40)
            found += [error, counts, sums, *compiled.codebook_stats(g, codes, 40)]
            found.append(compiled.codebook_gradient(x, quantized.nan_to_num(), codes, error.nan_to_num(), 40))
            found += [compiled.quantize_backward(x, quantized, codes, g, error, turn) for turn in (False, True)]
            wide = book.to(error.dtype)
            state, revive = [wide.clone(), wide[:, 0].abs(), wide.clone()], codes[0, :40] < 3
            compiled.ema_update_(*state, counts, sums, revive, 0.9, 1e-5, 2.0, True)
            compiled.ema_step_(x, codes, *state, 0.9, 1e-5, False)
            found += state
        return found

    here = results()
    monkeypatch.setenv("VQKERNELS_CPU_ISA", "portable")
    for mine, portable in zip(here, results(), strict=True):
        assert torch.equal(mine.nan_to_num(), portable.nan_to_num())


@pytest.mark.parametrize("crowd", [1, 3000], ids=["even", "crowded"])
def test_an_ema_step_is_the_same_on_any_number_of_threads(crowd: int):
    """Also where a code has more tokens than are fetched at a time, and codes are more than a block of sizes."""
    x, size = _randn(2, 5000, 40, seed=50), 9000
    codes = _codes(10_000, size, seed=51).view(2, 5000)
    codes[0, :crowd] = 7
    first = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        state = [_randn(size, 40, seed=52), torch.ones(size), _randn(size, 40, seed=53)]
        compiled.ema_step_(x, codes, *state, 0.9, 1e-5, False)
        first = state if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(state, first, strict=True))
    true = code_sums(x, codes, size) * 0.1 + 0.9 * _randn(size, 40, seed=53).double()
    torch.testing.assert_close(first[2].double(), true, rtol=1e-6, atol=1e-6)


def test_ema_update_without_tokens_leaves_the_codes_alone():
    codebook, embed_sum, sums = (_randn(6, 4, seed=seed) for seed in (30, 31, 32))
    cluster_size, revive = torch.rand(6), torch.tensor([False, True] * 3)
    before = [t.clone() for t in (codebook, cluster_size, embed_sum)]
    counts = revive.float()  # only the sampled tokens of revived codes
    compiled.ema_update_(codebook, cluster_size, embed_sum, counts, sums, revive, 0.9, 1e-5, 1.5, False)
    for now, then in zip((codebook, cluster_size, embed_sum), before, strict=True):
        assert torch.equal(now[~revive], then[~revive])
    assert torch.equal(codebook[revive], sums[revive])
    assert (cluster_size[revive] == 1.5).all()


# ------------------------------------------------------------------------------------------- errors

X, BOOK, CODES = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "x rank": (
        lambda: compiled.nearest(X[0], BOOK, "euclidean", "exact"),
        r"x: expected \[B, T, D\], got shape \[3, 4\]",
    ),
    "x dtype": (lambda: compiled.nearest(X.int(), BOOK, "euclidean", "exact"), "x: expected float32.*got Int"),
    "book dtype": (
        lambda: compiled.nearest(X, BOOK.half(), "euclidean", "exact"),
        "codebook: expected dtype Float.*got Half",
    ),
    "book dim": (
        lambda: compiled.nearest(X, BOOK[:, :3], "euclidean", "exact"),
        r"codebook: expected size 4 \(D of x\)",
    ),
    "book empty": (lambda: compiled.nearest(X, BOOK[:0], "euclidean", "exact"), "codebook: expected K >= 1"),
    "codes dtype": (lambda: compiled.gather(X, BOOK, CODES.int()), "codes: expected dtype Long, got Int"),
    "codes shape": (lambda: compiled.gather(X, BOOK, CODES[:, :2]), r"codes: expected size 3 \(T of x\).*\[2, 2\]"),
    "codes range": (lambda: compiled.gather(X, BOOK, CODES + 5), "codes: expected values below K = 5, got 5"),
    "stats range": (
        lambda: compiled.codebook_stats(X, CODES + 7, 7),
        "codes: expected values below codebook_size = 7, got 7",
    ),
    "step range": (
        lambda: compiled.ema_step_(X, CODES + 5, BOOK, BOOK[:, 0].clone(), BOOK.clone(), 0.9, 1e-5, False),
        "codes: expected values below codebook_size = 5, got 5",
    ),
    "step dtype": (
        lambda: compiled.ema_step_(X.double(), CODES, BOOK, BOOK[:, 0].clone(), BOOK.clone(), 0.9, 1e-5, False),
        "codebook: expected dtype Double, got Float",
    ),
    "derror": (
        lambda: compiled.quantize_backward(X, X, CODES, X, CODES, False),
        "derror: expected dtype Float, got Long",
    ),
    "ema revive": (
        lambda: compiled.ema_update_(
            BOOK, BOOK[:, 0].clone(), BOOK, BOOK[:, 0].clone(), BOOK, CODES[0], 0.9, 1e-5, 1.0, False
        ),
        "revive: expected dtype Bool, got Long",
    ),
    "ema layout": (
        lambda: compiled.ema_update_(BOOK, BOOK[:, 0], BOOK, BOOK[:, 0], BOOK, CODES[0], 0.9, 1e-5, 1.0, False),
        "cluster_size: expected a contiguous tensor",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_an_instruction_set_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VQKERNELS_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"VQKERNELS_CPU_ISA: expected avx512, avx2 .*got avx1024"):
        compiled.nearest(X, BOOK, "euclidean", "exact")

"""``vqkernels.kmeans``: against Lloyd's algorithm in float64, starts, empty centroids, batches, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from formulas import inertia
from formulas import lloyd as lloyd_in_float64
from host_waits import HostWait, no_host_waits
from quantizers import make, randn
from torch import Tensor

import vqkernels as vq
from vqkernels.nn import kmeans as module
from vqkernels.nn import lloyd, seeding


def clusters(tokens: int, number: int, dim: int, seed: int = 0, width: float = 0.05) -> Tensor:  # [tokens, dim]
    """Well separated groups, in random order."""
    centres = 3 * randn(number, dim, seed=1000 + seed)
    part = torch.randint(number, (tokens,), generator=torch.Generator().manual_seed(seed))
    return centres[part] + width * randn(tokens, dim, seed=seed + 1)


# ---- Lloyd ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_it_is_lloyds_algorithm(backend, metric: str):
    name, device = backend
    tokens, size, steps = (60, 6, 2) if name == "triton" else (600, 20, 5)
    x = randn(tokens, 5)
    start = torch.nn.functional.normalize(x[:size]) if metric == "cosine" else x[:size]
    found = vq.kmeans(x.to(device), size, init=start.to(device), iterations=steps, metric=metric)
    expected = lloyd_in_float64(x, start, steps, metric)
    # a mean of float32 numbers of size 1, rounded once an iteration
    torch.testing.assert_close(found.centroids.cpu().double(), expected, rtol=0, atol=1e-6)
    codes, distance = vq.nearest(x.to(device), found.centroids, metric=metric)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.counts, codes.bincount(minlength=size).double())
    torch.testing.assert_close(found.inertia, distance.double().sum())
    assert found.iterations == steps


def test_batches_give_what_one_tensor_gives():
    x, start = randn(500, 6), randn(12, 6, seed=1)
    whole = vq.kmeans(x, 12, init=start)
    for batches in (x.split(100), list(x.view(5, 10, 10, 6)), torch.utils.data.DataLoader(list(x), batch_size=37)):
        parts = vq.kmeans(batches, 12, init=start)
        torch.testing.assert_close(parts.centroids, whole.centroids, rtol=0, atol=1e-6)
        torch.testing.assert_close(parts.counts, whole.counts)
        torch.testing.assert_close(parts.inertia, whole.inertia)
        assert parts.codes is None
    assert torch.equal(start, randn(12, 6, seed=1))  # the caller's tensor stays


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(dtype: torch.dtype):
    x = randn(4, 3, 50).to(dtype)  # [B, D, T]
    found = vq.kmeans(x.transpose(1, 2), 7)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.centroids.dtype == wide
    assert found.codes.shape == (4, 50)
    flat = vq.kmeans(x.transpose(1, 2).reshape(200, 3).to(wide), 7)
    torch.testing.assert_close(found.centroids, flat.centroids, rtol=1e-5, atol=1e-5)


def test_without_the_last_pass_there_are_no_codes():
    x = randn(300, 4)
    short, full = (vq.kmeans(x, 8, iterations=3, assign=assign) for assign in (False, True))
    assert torch.equal(short.centroids, full.centroids)
    assert short.codes is None
    assert short.inertia > full.inertia  # before the last move


def test_a_tolerance_ends_it_early():
    x = clusters(500, 10, 4)
    found = vq.kmeans(x, 10, iterations=100, tolerance=0.0)
    assert found.iterations < 50
    assert torch.equal(found.centroids, vq.kmeans(x, 10, iterations=found.iterations).centroids)
    more = vq.kmeans(x, 10, init=found.centroids, iterations=1)
    torch.testing.assert_close(more.inertia, found.inertia)


def test_tokens_that_are_not_finite_are_left_out():
    x, start = randn(200, 4), randn(5, 4, seed=1)
    spoiled = torch.cat([x, x[:3].clone()])
    spoiled[200:, 1] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for init in (start, "random", "k-means++"):
        found = vq.kmeans(spoiled.roll(50, 0), 5, init=init)
        assert found.centroids.isfinite().all()
        assert found.counts.sum() == 200
        assert (found.codes[50 - 3 : 50] == -1).all() or (found.codes < 0).sum() == 3
    assert torch.equal(vq.kmeans(spoiled, 5, init=start).centroids, vq.kmeans(x, 5, init=start).centroids)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_no_more_tokens_than_centroids(init: str):
    x = randn(9, 3)
    x[4] = float("nan")
    for size in (8, 20):
        found = vq.kmeans(x, size, init=init)
        assert found.inertia == 0
        assert found.centroids.isfinite().all()
        assert sorted(found.counts.tolist()) == [0.0] * (size - 8) + [1.0] * 8
    assert vq.kmeans(x[:1].expand(50, 3), 4, init=init).inertia == 0


# ---- the start ----


def test_kmeans_plus_plus_finds_separated_clusters():
    x = clusters(4000, 64, 8)
    spread, random = (vq.kmeans(x, 64, init=init, iterations=5).inertia for init in ("k-means++", "random"))
    best = 4000 * 8 * 0.05**2
    assert random > 20 * best
    assert spread < 0.3 * random


def test_draws_follow_their_masses_and_are_made_once():
    tokens, seed = torch.arange(40.0)[:, None], torch.tensor(3)
    mass = torch.arange(40) % 4  # 60 in all
    drawn = []
    for draw in range(300):
        hit, rows = seeding.draw_tokens(tokens, mass, 6, seed, draw, seeding.Ranks())
        assert hit.all()
        drawn.append(rows[:, 0].long())
    counts = torch.stack(drawn).flatten().bincount(minlength=40)
    expected = 300 * 6 / 60 * mass
    assert (counts[mass == 0] == 0).all()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1).all()
    hit, rows = seeding.draw_tokens(tokens, (mass > 0).long(), 50, seed, 0, seeding.Ranks())
    assert hit.sum() == 30  # each once, and no more than there are
    assert rows[hit].unique().numel() == 30


def test_masses_keep_proportions_at_any_scale():
    weight = torch.tensor([0.0, 1.0, 3.0, float("nan"), 2.0**-20])
    for scale in (1e-30, 1.0, 1e30):
        mass = seeding.masses(weight * scale, seeding.Ranks()).double()
        torch.testing.assert_close(mass / mass[1], weight.nan_to_num().double(), rtol=1e-6, atol=0)
    assert seeding.masses(torch.zeros(3), seeding.Ranks()).sum() == 0
    assert seeding.masses(torch.full((1000,), torch.inf), seeding.Ranks()).sum() > 0


# ---- centroids without tokens ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_centroids_without_tokens_share_those_of_the_largest(metric: str):
    x = randn(2000, 4)
    away = torch.cat([x[:8], 1e6 + randn(24, 4)]) if metric == "euclidean" else x[:1].repeat(32, 1)
    found = vq.kmeans(x, 32, init=away, iterations=12, metric=metric)
    assert (found.counts > 0).all()
    assert found.inertia < 1.1 * vq.kmeans(x, 32, iterations=12, metric=metric).inertia


def test_a_split_never_makes_the_inertia_larger():
    x, start = randn(500, 3), torch.cat([randn(4, 3), torch.full((4, 3), 1e4)])
    plain = lloyd_in_float64(x, start[:4], 1)
    found = vq.kmeans(x, 8, init=start, iterations=1)
    assert inertia(x, found.centroids) < inertia(x, plain)
    torch.testing.assert_close(found.centroids[:4].double(), plain, rtol=0, atol=1e-6)


def test_equal_tokens_leave_nothing_to_split():
    x = randn(3, 4).repeat(50, 1)
    found = vq.kmeans(x, 10)
    assert found.inertia < 150 * 4 * (2 * 2.0**-23) ** 2  # a sum rounded, a quotient rounded, of numbers below 4
    assert (found.counts > 0).sum() == 3


# ---- mini-batches and samples ----


def test_a_mini_batch_centroid_is_the_mean_of_all_it_was_given():
    x, start = randn(60, 3), randn(4, 3, seed=1)
    mean, weight = start.double(), torch.zeros(4).double()
    for batch in x.split(20):
        codes = torch.cdist(batch.double(), mean).argmin(1)
        for k, token in zip(codes.tolist(), batch.double(), strict=True):  # Sculley 2010, algorithm 1
            weight[k] += 1
            mean[k] += (token - mean[k]) / weight[k]
    found = vq.kmeans(x.split(20), 4, init=start, mini_batch=True, iterations=1)
    torch.testing.assert_close(found.centroids.double(), mean, rtol=0, atol=1e-6)


def test_mini_batches_come_near_lloyd_also_from_a_stream():
    x = clusters(4000, 16, 6, width=1.0)
    full = vq.kmeans(x, 16).inertia
    passes = vq.kmeans(x.split(250), 16, mini_batch=True, iterations=3)
    assert passes.inertia < 1.15 * full
    stream = vq.kmeans(iter(x.split(250)), 16, mini_batch=True, iterations=1)
    assert stream.counts.sum() == 4000
    assert inertia(x, stream.centroids) < 1.3 * full


def test_a_sample_is_uniform_and_of_the_size_asked_for():
    x = torch.arange(1000.0)[:, None]
    x[::10] = float("nan")
    found = vq.kmeans(iter(x.split(64)), 300, max_tokens=300, iterations=0, init="random")
    assert found.counts.sum() == 300
    assert found.centroids.unique().numel() == 300
    assert abs(found.centroids.mean().item() - 500) < 5 * 289 / 300**0.5
    whole = vq.kmeans(x, 10, max_tokens=300)
    assert whole.counts.sum() == 900
    assert whole.codes.shape == (1000,)


# ---- what it promises ----


def test_the_same_bits_again_and_on_any_number_of_threads():
    x = clusters(20_000, 300, 8, width=1.0)
    runs = [{"init": "random"}, {}, {"metric": "cosine"}, {"max_tokens": 5000}, {"tolerance": 1e-3}]
    for options in runs:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(vq.kmeans(x, 256, iterations=3, **options))
        for other in found[1:]:
            for name in ("centroids", "codes", "counts", "inertia"):
                assert torch.equal(getattr(other, name), getattr(found[0], name)), (options, name)
    other = vq.kmeans(x, 256, iterations=3, seed=1)
    assert not torch.equal(other.centroids, vq.kmeans(x, 256, iterations=3).centroids)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_iterations_and_the_first_training_step_never_wait_for_the_device(metric: str):
    x, seed = randn(900, 4), torch.tensor(5)
    x[7] = float("nan")
    measure, rows = lloyd.Measure(metric), randn(10, 4, seed=1)
    codebook, flag = randn(10, 4, seed=1), torch.tensor(False)
    with no_host_waits():
        lloyd.lloyd_(rows, lambda: [x], measure, seed, 3)
        lloyd.mini_batches_(rows, lambda: x.split(100), measure, seed, 2)
        module._initialize(x[None], x[None, :, 0] > 0, codebook, flag, seed, metric, "exact", -1)
    with pytest.raises(HostWait), no_host_waits():
        lloyd.lloyd_(rows, lambda: [x], measure, seed, 3, tolerance=0.1)
    assert flag
    assert not torch.equal(codebook, randn(10, 4, seed=1))


def test_a_codebook_that_is_initialised_already_stays():
    codebook, flag = randn(10, 4), torch.tensor(True)
    module.initialize_(randn(1, 50, 4), None, codebook, flag, torch.tensor(0), "euclidean", "exact", -1)
    assert torch.equal(codebook, randn(10, 4))


X = randn(20, 3)
BAD: dict[str, tuple[Any, ...]] = {
    "no tokens": ((X[:0], 4), {}, ValueError, "x: expected at least one finite token"),
    "nan only": ((X * float("nan"), 4), {}, ValueError, "x: expected at least one finite token"),
    "nan only, given start": ((X * float("nan"), 2), {"init": X[:2]}, ValueError, "x: expected at least one finite"),
    "no batch": (([], 4), {}, ValueError, r"x: expected at least one batch"),
    "integers": ((X.long(), 4), {}, TypeError, "x: expected tensors of float32.*got torch.int64"),
    "a number": ((3, 4), {}, TypeError, "x: expected a tensor or an iterable of them, got int"),
    "size": ((X, 0), {}, ValueError, "codebook_size: expected an integer >= 1, got 0"),
    "iterations": ((X, 4), {"iterations": -1}, ValueError, "iterations: expected an integer >= 0, got -1"),
    "metric": ((X, 4), {"metric": "dot"}, ValueError, "metric: expected one of"),
    "init": ((X, 4), {"init": "pca"}, ValueError, "init: expected one of"),
    "init shape": ((X, 4), {"init": X[:3]}, ValueError, r"init: expected \[4, D\] like codebook_size, got shape"),
    "init dim": ((X, 4), {"init": X[:4, :2]}, ValueError, r"x: expected \[\.\.\., 2\]"),
    "tolerance": ((X, 4), {"tolerance": -0.1}, ValueError, "tolerance: expected >= 0"),
    "max_tokens": ((X, 4), {"max_tokens": 0}, ValueError, "max_tokens: expected an integer >= 1"),
    "iterator": ((iter([X]), 4), {}, ValueError, "x: expected batches that can be gone over again.*got list_iterator"),
    "passes": ((iter([X]), 4), {"mini_batch": True}, ValueError, "x: expected batches that can be gone over again"),
    "mini-batch": ((X, 4), {"mini_batch": True}, ValueError, r"mini_batch: expected batches, as x.split\(4096\)"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(case):
    arguments, options, error, message = case
    with pytest.raises(error, match=message):
        vq.kmeans(*arguments, **options)


# ---- several processes ----

SPLITS = {"unequal": (250, 150), "empty rank": (400, 0)}
RUNS: dict[str, dict[str, Any]] = {
    "given": {"init": randn(10, 5, seed=1)},
    "k-means++": {},
    "random": {"init": "random"},
    "cosine": {"metric": "cosine"},
    "tolerance": {"tolerance": 1e-3, "iterations": 50},
    "few": {"codebook_size": 500},
}


def run(x: Tensor, options: dict[str, Any]) -> vq.KMeansResult:
    return vq.kmeans(x, **{"codebook_size": 10, **options})


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for split, sizes in SPLITS.items():
        x = randn(400, 5).split(sizes)[rank]
        for name, options in RUNS.items():
            found[f"{name}, {split}"] = run(x, options)
        batches = x.split(60) if rank == 0 else x.split(30)  # not as many on either rank
        for mode in (False, True):
            found[f"batches {mode}, {split}"] = vq.kmeans(batches, 10, init=RUNS["given"]["init"], mini_batch=mode)
        found[f"sample, {split}"] = vq.kmeans(x, 10, max_tokens=100)
        found[f"sample alone, {split}"] = vq.kmeans(x, 100, max_tokens=100, init="random", iterations=0)
    torch.save({name: vars(result) for name, result in found.items()}, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(worker, 2, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_all_ranks_hold_the_same_bits(ranks: list[dict[str, Any]]):
    for name, first in ranks[0].items():
        for key in ("centroids", "counts", "inertia"):
            assert torch.equal(first[key], ranks[1][name][key]), (name, key)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process_with_the_joined_tokens(ranks: list[dict[str, Any]], name: str, split: str):
    alone = run(randn(400, 5), RUNS[name])
    first, second = (each[f"{name}, {split}"] for each in ranks)
    torch.testing.assert_close(first["centroids"], alone.centroids, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([first["codes"], second["codes"]]), alone.codes)
    assert torch.equal(first["counts"], alone.counts)
    torch.testing.assert_close(first["inertia"], alone.inertia)
    assert first["iterations"] == alone.iterations


@pytest.mark.parametrize("split", SPLITS)
def test_batches_and_samples_of_two_ranks(ranks: list[dict[str, Any]], split: str):
    x = randn(400, 5)
    alone = vq.kmeans(x, 10, init=RUNS["given"]["init"])
    torch.testing.assert_close(ranks[0][f"batches False, {split}"]["centroids"], alone.centroids, rtol=0, atol=1e-6)
    for name in (f"batches True, {split}", f"sample, {split}"):
        assert ranks[0][name]["counts"].sum() == 400
        assert inertia(x, ranks[0][name]["centroids"]) < 1.3 * alone.inertia
    drawn = ranks[0][f"sample alone, {split}"]["centroids"]
    assert drawn.unique(dim=0).shape[0] == 100
    share = [(drawn[:, None] == part).all(-1).any(1).sum().item() for part in x.split(SPLITS[split])]
    assert sum(share) == 100
    assert share[0] == 100 * SPLITS[split][0] // 400


def test_init_codebook_is_kmeans():
    x, quantizer = randn(300, 8), make(8, 32)
    fresh = copy.deepcopy(quantizer)
    quantizer.init_codebook(x, iterations=4)
    found = vq.kmeans(x, 32, iterations=4, seed=int(fresh.seed))
    assert torch.equal(quantizer.codebook, found.centroids)

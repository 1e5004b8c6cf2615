"""Two and four processes equal one with the joined batch, whatever each of them has to give."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from quantizers import OPTIONS as ALL_OPTIONS
from quantizers import TRAINING_OPTIONS, make, randn
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vqkernels as vq
from vqkernels.nn import VectorQuantizer, defer_codebook_update, distributed, statistics

STEPS = 5
Batch = tuple[Tensor, Tensor]  # x [T, 8], mask bool [T]


def batches(step: int, sizes: tuple[int, ...], masked: int | None = None) -> list[Batch]:
    """What each rank sees in ``step``; the tokens of rank ``masked`` are all padding."""
    parts = randn(sum(sizes), 8, seed=100 + step).split(sizes)
    return [(x, torch.full((len(x),), rank != masked)) for rank, x in enumerate(parts)]


def joined(parts: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


SPLITS: dict[str, dict[str, Any]] = {
    "equal": {"sizes": (40, 40)},
    "unequal": {"sizes": (71, 9)},
    "empty rank": {"sizes": (80, 0)},
    "all-masked rank": {"sizes": (40, 40), "masked": 1},
    "four": {"sizes": (20, 20, 20, 20)},
    "four, all of it": {"sizes": (47, 0, 20, 13), "masked": 2},  # unequal, one empty, one all padding
}
HARD = "four, all of it"
OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {},
    "cosine": {"metric": "cosine"},
    "gradient": {"update": "gradient"},
    "projected": {"codebook_dim": 5},
}
DDP = [("ema", True), ("ema", False), ("gradient", True)]  # update, broadcast_buffers
CASES = [(option, split) for option in OPTIONS for split in SPLITS]
WAYS = ("plain", "checkpointed", "resumed", "copied", "captured")  # all with the same result, bit for bit
EVERY = {
    **ALL_OPTIONS,
    **TRAINING_OPTIONS,
    "everything": {"metric": "cosine", "dead_code_threshold": 0.3, "kmeans_init": True},
}


def ways_of(name: str) -> tuple[str, ...]:
    return WAYS if name in ("plain", "everything") else WAYS[:3]  # nothing in the others depends on an option


def world_of(split: str) -> int:
    return len(SPLITS[split]["sizes"])


def rounds(module: VectorQuantizer, pick: Callable[[list[Batch]], Batch], split: dict[str, Any]) -> list[Tensor]:
    """Train for some steps; usage and perplexity of each."""
    seen = []
    for step in range(STEPS):
        out = module(*pick(batches(step, **split)))
        seen.append(torch.stack([out.usage, out.perplexity]))
    return seen


class Recomputed(nn.Module):
    """Runs a quantizer under activation checkpointing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(lambda x, mask: tuple(self.module(x, mask)), x, mask, use_reentrant=False)


def prepared(module: VectorQuantizer, way: str) -> nn.Module:
    recomputed = Recomputed(module) if way in ("checkpointed", "compiled") else module
    return torch.compile(recomputed, fullgraph=True, backend="aot_eager") if way == "compiled" else recomputed


def run_way(way: str, options: dict[str, Any], mine: Callable[[list[Batch]], Batch], split: str) -> dict[str, Tensor]:
    """Train with backward passes; what is left, and the last step's outputs and gradient."""
    module = make(**options)
    runs = prepared(module, way)
    # a CUDA graph of a step is recorded as if nothing could be on its way when the step ends
    patched = mock.patch.object(statistics, "capturing", return_value=True) if way == "captured" else nullcontext()
    for step in range(STEPS):
        if way == "resumed" and step == 3:
            saved = snapshot(module)
            runs = module = make(seed=7, **options)
            module.load_state_dict(saved)
        if way == "copied" and step == 3:
            runs = module = copy.deepcopy(module)
        x, mask = mine(batches(step, **SPLITS[split]))
        x = x.clone().requires_grad_()
        with patched:
            quantized, codes, loss = runs(x, mask)
        (quantized.square().sum() + loss).backward()
    return snapshot(module) | {"codes": codes, "loss": loss.detach(), "dx": x.grad}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


class Model(nn.Module):
    """A quantizer between two layers, to train under DDP."""

    def __init__(self, update: str = "ema") -> None:
        super().__init__()
        self.encoder, self.vq, self.decoder = nn.Linear(8, 8), make(update=update), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.vq(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss


def fit(model: nn.Module, pick: Callable[[list[Batch]], Batch], **step_options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(pick(batches(step, (40, 40)))[0]).backward()
        optimizer.step()


# ---- what each process runs ----


def worker(rank: int, folder: str, early: VectorQuantizer) -> None:
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            store = f"file://{folder}/store{world}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            results = run_splits(rank, world, early) | (run_two(rank) if world == 2 else run_four(rank))
            torch.save(results, f"{folder}/{world}-rank{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()


def run_splits(rank: int, world: int, early: VectorQuantizer) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for option, split in CASES:
        if world_of(split) == world:
            module = copy.deepcopy(early) if option == "ema" else make(**OPTIONS[option])
            metrics = rounds(module, lambda parts: parts[rank], SPLITS[split])
            results[f"{option}, {split}"] = {"state": snapshot(module), "metrics": metrics}
    return results


def run_two(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {"collectives": count_collectives(rank), "on their way": run_on_their_way(rank)}
    for way in ("plain", "compiled"):
        results[way] = run_way(way, EVERY["everything"], lambda parts: parts[rank], "unequal")
    results |= {"revival": run_revival(rank), "k-means": run_kmeans(rank)}
    return results | {f"ddp {update} {flag}": run_ddp(rank, update, flag) for update, flag in DDP}


def run_four(rank: int) -> dict[str, Any]:
    def mine(parts: list[Batch]) -> Batch:
        return parts[rank]

    results: dict[str, Any] = {"accumulation": run_accumulation(mine)}
    for name, options in EVERY.items():
        results |= {f"{name}, {way}": run_way(way, options, mine, HARD) for way in ways_of(name)}
    return results


def run_on_their_way(rank: int) -> dict[str, Any]:
    """Sums that were still travelling when the module was saved, copied, pickled, cast or loaded."""
    module, loaded, later = make(), make(), make()
    first, second = (batches(step, (71, 9))[rank][0] for step in (0, 1))
    later(first)
    wide = copy.deepcopy(later).double()
    ends = {"copied": snapshot(copy.deepcopy(later)), "pickled": snapshot(pickle.loads(pickle.dumps(later)))}
    later(second)  # applies the first step's sums, and sends its own
    module(first)
    saved = snapshot(module)
    loaded(second)
    loaded.load_state_dict(saved)  # what loaded had collected is dropped, also what has not arrived
    return ends | {"saved": saved, "wide": snapshot(wide), "loaded": snapshot(loaded), "later": snapshot(later)}


def run_accumulation(pick: Callable[[list[Batch]], Batch]) -> dict[str, Tensor]:
    module = make()
    with defer_codebook_update(module):
        for step in range(STEPS):
            module(*pick(batches(step, **SPLITS[HARD])))
    return snapshot(module)


def run_revival(rank: int) -> dict[str, Any]:
    """A fifth of the codes is dead; then only rank 0 has tokens; then nobody."""
    module = make(8, 40, dead_code_threshold=0.2)
    module.cluster_size[::5] = 0
    for step, sizes in enumerate([(50, 50), (60, 0), (0, 0)]):
        module(batches(step, sizes)[rank][0])
        if step == 0:
            first = snapshot(module)
    return {"first": first, "state": snapshot(module)}


def run_kmeans(rank: int) -> dict[str, Tensor]:
    hidden, explicit, one_sided = make(kmeans_init=True), make(), make()
    parts = [batches(step, (150, 50))[rank][0] for step in range(2)]
    hidden(parts[0])
    explicit.init_codebook(parts[0])
    one_sided.init_codebook(parts if rank == 0 else [])
    found = {"hidden": hidden.codebook.clone(), "explicit": explicit.codebook, "one_sided": one_sided.codebook}
    resumed = make(kmeans_init=True, seed=rank)
    if rank == 0:  # a checkpoint read by rank 0 alone: DDP hands its buffers on, and nobody runs k-means
        resumed.load_state_dict(hidden.state_dict())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), resumed))
    model(parts[1])
    hidden.update_codebook()
    return found | {"trained": hidden.codebook, "resumed": resumed.codebook}


def run_ddp(rank: int, update: str, broadcast_buffers: bool) -> dict[str, Tensor]:
    torch.manual_seed(rank)  # DDP starts every rank from rank 0's weights
    model = Model(update)
    if rank == 1:
        model.vq = make(seed=5, update=update)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers will be called forward_sync_buffers
        wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    fit(wrapped, lambda parts: parts[rank])
    return snapshot(model)


def count_collectives(rank: int) -> dict[str, list[tuple[int, bool]]]:
    """Sizes, and whether in the background, of the all_reduces in two training forwards, an eval forward and saving."""
    x, found, calls, all_reduce = batches(0, (40, 40))[rank][0], {}, [], dist.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        calls.append((tensor.numel(), options.get("async_op", False)))
        return all_reduce(tensor, **options)

    dist.all_reduce = counted
    for option in ({}, {"dead_code_threshold": 0.3}, {"update": "gradient"}):
        module = make(**option)
        module(x)
        module(x)
        module.eval()
        module(x)
        module.state_dict()
        found[str(option)] = list(calls)
        calls.clear()
    dist.all_reduce = all_reduce
    return found


# ---- the comparison ----


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Every rank's results, by the number of ranks; the processes run every case once."""
    folder = tmp_path_factory.mktemp("ranks")
    early = make()  # built before there is a process group
    run_ranks(worker, 4, str(folder), early)
    return {world: [torch.load(folder / f"{world}-rank{rank}.pt") for rank in range(world)] for world in (2, 4)}


@pytest.fixture
def ranks(worlds: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of two."""
    return worlds[2]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Up to the order of float32 sums of 80 tokens over a few steps."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("option", "split"), CASES, ids=[", ".join(case) for case in CASES])
def test_the_ranks_equal_the_joined_batch(worlds: dict[int, list[dict[str, Any]]], option: str, split: str):
    alone = make(**OPTIONS[option])
    metrics = rounds(alone, joined, SPLITS[split])
    first, *others = (each[f"{option}, {split}"] for each in worlds[world_of(split)])
    for other in others:
        assert_same_bits(first["state"], other["state"])
        assert all(torch.equal(a, b) for a, b in zip(first["metrics"], other["metrics"], strict=True))
    assert_close(first["state"], alone.state_dict())
    for expected, got in zip(metrics, first["metrics"], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", EVERY)
def test_checkpointing_and_resuming_equal_the_plain_run(worlds: dict[int, list[dict[str, Any]]], name: str):
    """Also with k-means and revival, whose draws depend on how the tokens lie on the ranks."""
    ranks = worlds[4]
    for way in ways_of(name)[1:]:
        for each in ranks:
            assert_same_bits(each[f"{name}, {way}"], each[f"{name}, plain"])
    states = [{k: v for k, v in each[f"{name}, plain"].items() if k not in ("codes", "loss", "dx")} for each in ranks]
    for state in states[1:]:
        assert_same_bits(states[0], state)


PER_RANK = {"dead_code_threshold", "kmeans_init", "entropy", "sampling"}  # draw or sum over one rank's tokens


@pytest.mark.parametrize("name", [name for name in EVERY if not PER_RANK & set(EVERY[name])])
def test_outputs_and_gradients_on_four_ranks_are_those_of_one(worlds: dict[int, list[dict[str, Any]]], name: str):
    alone = run_way("plain", EVERY[name], joined, HARD)
    sizes, masked = SPLITS[HARD]["sizes"], SPLITS[HARD]["masked"]
    parts = [each[f"{name}, plain"] for each in worlds[4]]
    assert torch.equal(torch.cat([part["codes"] for part in parts]), alone["codes"])
    tokens = torch.tensor([0 if rank == masked else size for rank, size in enumerate(sizes)])
    loss = sum(part["loss"] * n for part, n in zip(parts, tokens, strict=True)) / tokens.sum()
    torch.testing.assert_close(loss, alone["loss"], rtol=1e-5, atol=1e-6)
    assert all((part["loss"] == 0) == (n == 0) for part, n in zip(parts, tokens, strict=True))
    assert not parts[masked]["dx"].any()


def test_a_compiled_checkpoint_on_two_ranks_equals_the_plain_run(ranks: list[dict[str, Any]]):
    for each in ranks:
        assert_same_bits(each["compiled"], each["plain"])


def test_sums_on_their_way_are_never_lost_or_counted_twice(ranks: list[dict[str, Any]]):
    alone = make()
    alone(joined(batches(0, (71, 9)))[0])
    first, second = (each["on their way"] for each in ranks)
    for name in first:
        assert_same_bits(first[name], second[name])
    assert_close(first["saved"], alone.state_dict())
    for name in ("copied", "pickled", "loaded"):
        assert_same_bits(first[name], first["saved"])
    for name, value in first["wide"].items():
        torch.testing.assert_close(value.to(first["saved"][name].dtype), first["saved"][name])
    alone(joined(batches(1, (71, 9)))[0])
    assert_close(first["later"], alone.state_dict())


def test_accumulation_over_ranks_equals_the_joined_batch(worlds: dict[int, list[dict[str, Any]]]):
    first, *others = (each["accumulation"] for each in worlds[4])
    for other in others:
        assert_same_bits(first, other)
    assert_close(first, run_accumulation(joined))
    alone = make()
    alone(*joined([part for step in range(STEPS) for part in batches(step, **SPLITS[HARD])]))
    for name in ("codebook", "cluster_size", "embed_sum"):
        torch.testing.assert_close(first[name], alone.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("update", "broadcast_buffers"), DDP)
def test_ddp_training_equals_one_process(ranks: list[dict[str, Any]], update: str, broadcast_buffers: bool):
    torch.manual_seed(0)
    alone = Model(update)
    fit(alone, joined)
    first, second = (each[f"ddp {update} {broadcast_buffers}"] for each in ranks)
    assert_same_bits(first, second)
    assert_close(first, alone.state_dict())


def test_revival_is_the_same_on_both_ranks_and_draws_from_both(ranks: list[dict[str, Any]]):
    first, second = (each["revival"] for each in ranks)
    assert_same_bits(first["first"], second["first"])
    assert_same_bits(first["state"], second["state"])
    revived = first["first"]["codebook"][::5]
    parts = batches(0, (50, 50))
    from_rank = [(revived[:, None] == x).all(-1).any(1) for x, _ in parts]
    assert (from_rank[0] ^ from_rank[1]).all()  # each code restarts at one token of one rank
    assert from_rank[0].any()
    assert from_rank[1].any()
    assert (first["first"]["cluster_size"][::5] == 0.4).all()


def test_kmeans_gives_all_ranks_the_same_good_codebook(ranks: list[dict[str, Any]]):
    first, second = (each["k-means"] for each in ranks)
    assert_same_bits(first, second)
    everything = [joined(batches(step, (150, 50)))[0] for step in range(2)]
    alone = make()
    alone.init_codebook(everything[0])

    def error(codebook: Tensor) -> float:
        return vq.nearest(everything[0], codebook)[1].mean().item()

    assert torch.equal(first["hidden"], first["explicit"])
    assert error(first["hidden"]) < 1.1 * error(alone.codebook)
    only_rank_0 = make()
    only_rank_0.init_codebook([batches(step, (150, 50))[0][0] for step in range(2)])
    own = torch.cat([batches(step, (150, 50))[0][0] for step in range(2)])
    ratio = vq.nearest(own, first["one_sided"])[1].mean() / vq.nearest(own, only_rank_0.codebook)[1].mean()
    assert ratio < 1.2
    assert torch.equal(first["resumed"], first["trained"])


def test_counts_travel_at_once_and_sums_in_the_background(ranks: list[dict[str, Any]]):
    sums = (32 * 8, True)
    for each in ranks:
        found = each["collectives"]
        assert found["{}"] == 2 * [(32, False), sums]
        assert found["{'dead_code_threshold': 0.3}"] == 2 * [(2 * 32, False), sums]  # counts | samples
        assert found["{'update': 'gradient'}"] == 2 * [(32, False)]


def test_without_a_process_group_nothing_is_reduced(tmp_path: Path):
    assert not dist.is_initialized()
    module = make()
    module(randn(10, 8))
    assert module.pending_counts.sum() == 10


def test_a_refused_capture_keeps_the_sums_on_their_way(monkeypatch: pytest.MonkeyPatch):
    owner, into, part = torch.zeros(()), torch.zeros(3), torch.ones(3)
    flight = distributed._Flight(StorageWeakRef(owner.untyped_storage()), mock.Mock(), part)
    monkeypatch.setitem(distributed._FLIGHTS, owner.data_ptr(), flight)
    with mock.patch.object(distributed, "capturing", return_value=True), pytest.raises(RuntimeError, match="call upd"):
        distributed.finish_all_reduce(owner, into)
    distributed.finish_all_reduce(owner, into)  # of update_codebook()
    distributed.finish_all_reduce(owner, into)
    assert torch.equal(into, part)

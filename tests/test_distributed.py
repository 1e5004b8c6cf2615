"""Two processes equal one with the joined batch, whatever each of them has to give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quantizers import make, randn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vqkernels as vq
from vqkernels.nn import VectorQuantizer, defer_codebook_update

STEPS = 5
Batch = tuple[Tensor, Tensor]  # x [T, 8], mask bool [T]


def batches(step: int, sizes: tuple[int, int], masked: bool = False) -> list[Batch]:
    """What each rank sees in ``step``; with ``masked`` rank 1's tokens are all padding."""
    x = randn(sum(sizes), 8, seed=100 + step)
    mask = torch.ones(len(x), dtype=torch.bool)
    if masked:
        mask[sizes[0] :] = False
    return list(zip(x.split(sizes), mask.split(sizes), strict=True))


def joined(parts: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts])


SPLITS: dict[str, dict[str, Any]] = {
    "equal": {"sizes": (40, 40)},
    "unequal": {"sizes": (71, 9)},
    "empty rank": {"sizes": (80, 0)},
    "all-masked rank": {"sizes": (40, 40), "masked": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {},
    "cosine": {"metric": "cosine"},
    "gradient": {"update": "gradient"},
}
CASES = [(option, split) for option in OPTIONS for split in SPLITS]


def rounds(module: VectorQuantizer, pick: Callable[[list[Batch]], Batch], split: dict[str, Any]) -> list[Tensor]:
    """Train for some steps; usage and perplexity of each."""
    seen = []
    for step in range(STEPS):
        out = module(*pick(batches(step, **split)))
        seen.append(torch.stack([out.usage, out.perplexity]))
    return seen


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


class Model(nn.Module):
    """A quantizer between two layers, to train under DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.vq, self.decoder = nn.Linear(8, 8), make(), nn.Linear(8, 8)

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
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {}

    def mine(parts: list[Batch]) -> Batch:
        return parts[rank]

    for option, split in CASES:
        module = copy.deepcopy(early) if option == "ema" else make(**OPTIONS[option])
        metrics = rounds(module, mine, SPLITS[split])
        results[f"{option}, {split}"] = {"state": snapshot(module), "metrics": metrics}
    results |= {"accumulation": run_accumulation(rank), "collectives": count_collectives(rank)}
    results["compiled"] = run_compiled(rank)
    results |= {"revival": run_revival(rank), "k-means": run_kmeans(rank)}
    results |= {f"ddp {flag}": run_ddp(rank, flag) for flag in (True, False)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_compiled(rank: int) -> dict[str, Tensor]:
    module = make(seed=rank)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(STEPS):
        fast(batches(step, (40, 40))[rank][0])
    return snapshot(module)


def run_accumulation(rank: int) -> dict[str, Tensor]:
    module = make()
    with defer_codebook_update(module):
        for step in range(STEPS):
            module(batches(step, (40, 40))[rank][0])
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


def run_ddp(rank: int, broadcast_buffers: bool) -> dict[str, Tensor]:
    torch.manual_seed(rank)  # DDP starts every rank from rank 0's weights
    model = Model()
    if rank == 1:
        model.vq = make(seed=5)
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
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both ranks' results; the processes run every case once."""
    folder = tmp_path_factory.mktemp("ranks")
    early = make()  # built before there is a process group
    mp.spawn(worker, args=(str(folder), early), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Up to the order of float32 sums of 80 tokens over a few steps."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("option", "split"), CASES, ids=[", ".join(case) for case in CASES])
def test_two_ranks_equal_the_joined_batch(ranks: list[dict[str, Any]], option: str, split: str):
    alone = make(**OPTIONS[option])
    metrics = rounds(alone, joined, SPLITS[split])
    first, second = (each[f"{option}, {split}"] for each in ranks)
    assert_same_bits(first["state"], second["state"])
    assert_close(first["state"], alone.state_dict())
    for expected, a, b in zip(metrics, first["metrics"], second["metrics"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected)


def test_a_compiled_quantizer_on_two_ranks_equals_the_joined_batch(ranks: list[dict[str, Any]]):
    alone = make()
    rounds(alone, joined, SPLITS["equal"])
    assert_same_bits(ranks[0]["compiled"], ranks[1]["compiled"])
    assert_close(ranks[0]["compiled"], alone.state_dict())


def test_accumulation_over_ranks_equals_the_joined_batch(ranks: list[dict[str, Any]]):
    alone = make()
    alone(torch.cat([joined(batches(step, (40, 40)))[0] for step in range(STEPS)]))
    first, second = (each["accumulation"] for each in ranks)
    assert_same_bits(first, second)
    for name in ("codebook", "cluster_size", "embed_sum"):
        torch.testing.assert_close(first[name], alone.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_ddp_training_equals_one_process(ranks: list[dict[str, Any]], broadcast_buffers: bool):
    torch.manual_seed(0)
    alone = Model()
    fit(alone, joined)
    first, second = (each[f"ddp {broadcast_buffers}"] for each in ranks)
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

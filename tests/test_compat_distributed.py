"""compat.VectorQuantize over two processes: as one with the joined batch, or on its own where the peer was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vector_quantize_pytorch as peer
from forked import run_ranks
from quantizers import randn
from torch import Tensor

from vqkernels import compat

STEPS = 4
SIZES = {"equal": (40, 40), "unequal": (71, 9), "empty": (80, 0)}
OPTIONS: dict[str, dict[str, Any]] = {
    "equal": {},
    "unequal": {"use_cosine_sim": True},
    "empty": {},
    "revival": {"threshold_ema_dead_code": 0.9},
    "kmeans": {"kmeans_init": True, "kmeans_iters": 3},
    "alone": {"sync_codebook": False, "threshold_ema_dead_code": 0.9},
}


def batch(step: int, name: str) -> tuple[Tensor, ...]:  # [1, N, 8] of each rank
    return randn(80, 8, seed=step)[None].split(SIZES.get(name, (40, 40)), dim=1)


def run(module: torch.nn.Module, name: str, rank: int | None) -> dict[str, Tensor]:
    """The state after a few steps of a rank, or of everybody."""
    for step in range(1 if name == "revival" else STEPS):
        parts = batch(step, name)
        module(torch.cat(parts, dim=1) if rank is None else parts[rank])
    return module.state_dict()


def make(name: str, kind: type = compat.VectorQuantize) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(8, 32, **OPTIONS[name])


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    early = {name: make(name) for name in OPTIONS}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 0:
        make("alone")(batch(0, "alone")[0])  # nobody waits for the other
    results = {name: run(module, name, rank) for name, module in early.items()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(worker, 2, str(folder))
    return [torch.load(folder / Path(f"rank{rank}.pt")) for rank in (0, 1)]


@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_equal_the_peer_with_the_joined_batch(ranks: list[dict[str, dict[str, Tensor]]], name: str):
    expected = run(make(name, peer.VectorQuantize), name, None)
    for key, value in expected.items():
        assert torch.equal(ranks[0][name][key], ranks[1][name][key])
        # float32 sums of up to 80 numbers of size 5 and less over sizes of 0.4 and more
        torch.testing.assert_close(ranks[0][name][key], value, rtol=0, atol=80 * 5 / 0.4 * 2**-24 * STEPS)


@pytest.mark.parametrize("name", ["revival", "kmeans"])
def test_what_is_drawn_is_drawn_alike(ranks: list[dict[str, dict[str, Tensor]]], name: str):
    for key, value in ranks[0][name].items():
        assert torch.equal(ranks[1][name][key], value)
    if name == "revival":  # at different tokens, of both ranks
        tokens, rows = randn(80, 8, seed=0), ranks[0][name]["_codebook.embed"][0]
        at = (rows[:, None] == tokens).all(2).nonzero()[:, 1]
        assert len(at.unique()) == len(at)
        assert (at < 40).any()
        assert (at >= 40).any()


def test_without_synchronisation_each_rank_is_alone(ranks: list[dict[str, dict[str, Tensor]]]):
    for rank in (0, 1):
        expected = run(make("alone"), "alone", rank)
        for key, value in expected.items():
            assert torch.equal(ranks[rank]["alone"][key], value)

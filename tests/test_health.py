"""What a codebook tells of itself, and the options of its EMA that depend on the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from quantizers import distances, make, randn

from vqkernels.nn import margin_histogram


def test_health_is_that_of_the_window_and_of_the_threshold():
    module = make(dead_code_threshold=0.5, usage_window=2)
    out = module(randn(60, 8))
    health = module.health()
    assert torch.equal(health.usage, out.usage)
    assert torch.equal(health.perplexity, out.perplexity)
    assert health.dead_share == 0
    module.cluster_size[:8] = 0.1
    assert module.health().dead_share == 0.25
    unbounded = make(usage_window=2)
    unbounded(randn(1, 8))
    assert unbounded.health().dead_share == 31 / 32


@pytest.mark.parametrize("options", [{}, {"update": "gradient"}, {"metric": "cosine"}], ids=str)
def test_norm_drift_counts_from_the_last_start(options: dict):
    module = make(**options)
    assert module.health().norm_drift.abs() < 1e-6
    with torch.no_grad():
        module.codebook *= 1.5
    torch.testing.assert_close(module.health().norm_drift, torch.tensor(0.5))
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    assert module.health().norm_drift.abs() < 1e-6
    module.init_codebook(randn(100, 8) * 10)
    assert module.health().norm_drift.abs() < 1e-6


def test_health_leaves_the_module_alone():
    module = make(dead_code_threshold=0.3)
    module(randn(30, 8))
    before = {name: value.clone() for name, value in module.named_buffers()}
    module.health()
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_margins_are_those_of_the_two_nearest(metric: str):
    x, codebook = randn(500, 8), randn(20, 8, seed=1)
    x[3] = float("nan")
    counts = margin_histogram(x, codebook, bins=5, metric=metric)
    kept = torch.cat([x[:3], x[4:]]).double()
    if metric == "cosine":
        units = [rows / rows.norm(dim=1, keepdim=True) for rows in (kept, codebook.double())]
        apart = 1 - units[0] @ units[1].T
    else:
        apart = distances(kept, codebook.double()).square()
    near, second = apart.sort(dim=1).values[:, :2].unbind(1)
    expected = torch.histc(((second - near) / second).float(), 5, 0, 1)
    assert counts.sum() == 499
    assert (counts - expected).abs().sum() <= 2  # a margin within rounding of an edge
    assert torch.equal(margin_histogram(codebook, codebook, bins=4), torch.tensor([0.0, 0.0, 0.0, 20.0]))
    ties = margin_histogram(torch.zeros(6, 8), torch.eye(8), bins=3)
    assert torch.equal(ties, torch.tensor([6.0, 0.0, 0.0]))


def test_bad_bins_are_named():
    with pytest.raises(ValueError, match="bins: expected an integer >= 1, got 0"):
        margin_histogram(randn(3, 8), randn(4, 8), bins=0)


@pytest.mark.parametrize("tokens", [64, 6400])
def test_a_relative_threshold_revives_the_same_codes_at_any_batch_size(tokens: int):
    module = make(8, 32, dead_code_threshold=0.25, dead_code_unit="mean", ema_decay=0.5)
    mean = tokens / 32
    module.cluster_size.fill_(mean * 29 / 24)
    module.cluster_size[:8] = mean * 3 / 8  # 32 codes, mean size `mean`
    module.cluster_size[:5] = 0.2 * mean
    size = module.cluster_size.mean().clone()
    x = randn(tokens, 8)
    module(x)
    assert torch.equal(module.pending_revive.nonzero().flatten(), torch.arange(5))
    module.update_codebook()
    assert (distances(module.codebook[:5], x).min(dim=1).values == 0).all()
    torch.testing.assert_close(module.cluster_size[:5], (0.5 * size).expand(5))  # two thresholds
    torch.testing.assert_close(module.embed_sum[:5], module.codebook[:5] * 0.5 * size)
    assert not module.pending_counts.any()
    assert not module.pending_sums.any()
    assert not module.pending_revive.any()


def test_a_relative_threshold_kills_no_code_of_a_new_codebook():
    module = make(8, 32, dead_code_threshold=0.9, dead_code_unit="mean")
    module(randn(5000, 8))
    assert not module.pending_revive.any()


def test_plain_smoothing_moves_a_code_by_its_own_tokens_alone():
    module = make(smoothing="plain", eps=0.5, ema_decay=0.5)
    module(randn(50, 8))
    module.update_codebook()
    torch.testing.assert_close(module.codebook, module.embed_sum / (module.cluster_size + 0.5)[:, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": "none"}, "smoothing: expected one of"),
        ({"dead_code_unit": "share"}, "dead_code_unit: expected one of"),
        ({"dead_code_unit": "mean", "dead_code_threshold": 1.0}, r"dead_code_threshold: expected in \[0, 1\)"),
    ],
)
def test_bad_ema_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)

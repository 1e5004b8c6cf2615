"""How the codebook of a VectorQuantizer learns: EMA and its moments, accumulation, recomputation, revival, k-means,
usage."""

from __future__ import annotations

import pytest
import torch
from quantizers import OPTIONS, assert_same_state, distances, every_option, make, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqkernels as vq
from vqkernels.nn import VectorQuantizer, defer_codebook_update
from vqkernels.nn.sampling import sample_tokens

# ---- EMA: what it does and when ----


def test_ema_follows_the_formula():
    module = make(ema_decay=0.9, eps=1e-3)
    x, (c, n, m) = randn(60, 8), (module.codebook.clone(), module.cluster_size.clone(), module.embed_sum.clone())
    codes = module(x).codes
    counts, sums = vq.codebook_stats(x, codes, 32)
    n, m = 0.9 * n + 0.1 * counts, 0.9 * m + 0.1 * sums
    assert torch.equal(module.codebook, c)  # not before the backward
    module.update_codebook()
    torch.testing.assert_close(module.codebook, m / ((n + 1e-3) / (n.sum() + 32e-3) * n.sum())[:, None])
    torch.testing.assert_close(module.cluster_size, n)


def test_statistics_take_effect_at_the_documented_moments():
    x = randn(60, 8)
    moments = {
        "next training forward": lambda m: m(x),
        "eval": lambda m: m.eval(),
        "state_dict": lambda m: m.state_dict(),
        "update_codebook": lambda m: m.update_codebook(),
    }
    for name, act in moments.items():
        module = make()
        before = module.codebook.clone()
        module(x)
        assert torch.equal(module.codebook, before)
        act(module)
        after = module.codebook.clone()
        assert not torch.equal(after, before), name
        module.update_codebook()  # a second time only what a new forward collected
        assert torch.equal(module.codebook, after) == (name != "next training forward")


def test_an_ema_codebook_learns_clusters():
    centers = randn(16, 8, seed=3) * 3
    module = make(8, 64, ema_decay=0.8, dead_code_threshold=0.5)
    for seed in range(60):
        module(centers[torch.arange(160) % 16] + 0.01 * randn(160, 8, seed=seed))
    assert vq.nearest(centers, module.eval().codebook)[1].max() < 0.01


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if not {"dead_code_threshold", "kmeans_init"} & set(o)])
def test_accumulation_equals_the_joined_batch(name: str):
    """But for k-means and revival, which draw from the first part."""
    micro, joined = make(**OPTIONS[name]), make(**OPTIONS[name])
    for step in range(3):
        x, mask = randn(60, 8, seed=step), randn(60, seed=step + 9) > -1
        mask[20:40] = False  # all of the second part is padding; the third one is empty
        parts = [slice(0, 20), slice(20, 40), slice(40, 40), slice(40, 60)]
        with defer_codebook_update(nn.Sequential(micro)):
            outs = [micro(x[part], mask[part]) for part in parts]
        whole = joined(x, mask)
        assert torch.equal(torch.cat([out.codes for out in outs]), whole.codes)
        real = [mask[part].sum() for part in parts]
        loss = sum(out.loss * n for out, n in zip(outs, real, strict=True)) / sum(real)
        torch.testing.assert_close(loss, whole.loss)
    for key in ("codebook", "cluster_size", "embed_sum"):
        if key in joined.state_dict():
            torch.testing.assert_close(micro.state_dict()[key], joined.state_dict()[key], msg=key)


def test_revival_under_accumulation_restarts_at_one_real_token():
    module = make(dead_code_threshold=0.4)
    module.cluster_size[8:] = 0
    parts = [randn(20, 8, seed=i) for i in range(3)]
    with defer_codebook_update(module):
        for part in parts:
            module(part)
    module.update_codebook()
    apart = distances(module.codebook[8:], torch.cat(parts))
    assert (apart.min(dim=1).values == 0).all()
    assert len(apart.argmin(dim=1).unique()) == 24
    assert (apart[:, :20].min(dim=1).values == 0).sum() == 20  # all that the first micro-batch had to give
    assert (module.cluster_size[8:] == 0.8).all()


@pytest.mark.parametrize("reentrant", [False, True])
@every_option
def test_activation_checkpointing_equals_the_plain_run(options: dict, reentrant: bool):
    plain, recomputed = make(**options), make(**options)
    for step in range(4):
        x = randn(60, 8, seed=step)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantized, codes, loss = plain(a)
        (quantized.square().sum() + loss).backward()
        again = checkpoint(lambda x: tuple(recomputed(x)), b, use_reentrant=reentrant)
        (again[0].square().sum() + again[2]).backward()
        assert torch.equal(codes, again[1])
        assert torch.equal(a.grad, b.grad)
        assert_same_state(plain, recomputed)


# ---- revival ----


def test_dead_codes_restart_at_tokens_of_the_batch_and_are_protected():
    module = make(8, 64, dead_code_threshold=0.3, ema_decay=0.5)
    x = randn(400, 8)
    dead = torch.arange(64) % 3 == 0
    module.cluster_size[dead] = 0.1
    alive = module.codebook[~dead].clone()
    module(x)
    module.update_codebook()
    revived = module.codebook[dead]
    assert (distances(revived, x).min(dim=1).values == 0).all()
    assert len(revived.unique(dim=0)) == len(revived)  # no token twice
    assert (module.cluster_size[dead] == 0.6).all()
    torch.testing.assert_close(module.embed_sum[dead], revived * 0.6)
    assert not torch.equal(module.codebook[~dead], alive)


def test_revival_never_takes_masked_or_bad_tokens_and_waits_when_there_are_none():
    module = make(8, 64, dead_code_threshold=10.0)
    module.cluster_size.zero_()
    before = module.codebook.clone()
    x = randn(2, 30, 8)
    x[0] = float("nan")
    module(x, torch.zeros(2, 30, dtype=torch.bool))
    module.update_codebook()
    assert torch.equal(module.codebook, before)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 5:] = False
    module(x, mask)
    module.update_codebook()
    changed = module.codebook[(module.codebook != before).any(dim=1)]
    assert sorted(changed[:, 0].tolist()) == sorted(x[1, :5, 0].tolist())  # five real tokens, each once


def test_every_valid_token_is_equally_likely_to_be_drawn():
    tokens = torch.arange(60.0).reshape(3, 20, 1)
    valid = torch.arange(60).reshape(3, 20) % 3 != 1  # 40 of them
    wanted, seed = torch.arange(16) % 2 == 0, torch.tensor(12345)
    drawn = []
    for step in range(500):
        hits, rows = sample_tokens(tokens, valid, wanted, seed, torch.tensor(step))
        assert torch.equal(hits > 0, wanted)
        drawn.append(rows[wanted, 0].long())
        assert len(drawn[-1].unique()) == 8
    counts = torch.stack(drawn).flatten().bincount(minlength=60)
    assert (counts[~valid.flatten()] == 0).all()
    expected, sigma = 500 * 8 / 40, (500 * 0.2 * 0.8) ** 0.5  # each token is drawn in a fifth of the steps
    assert (counts[valid.flatten()] - expected).abs().max() < 4.5 * sigma


def test_without_a_threshold_no_code_is_revived():
    module = make()
    for seed in range(20):
        module(randn(5, 8, seed=seed) + 100)
    assert (module.cluster_size < 0.9).sum() >= 31


# ---- k-means ----


def inertia(module: VectorQuantizer, x: Tensor) -> float:
    return vq.nearest(x, module.codebook)[1].mean().item()


def test_init_codebook_finds_clusters_and_is_deterministic():
    centers = randn(16, 8, seed=3) * 3
    batches = [centers[torch.arange(80) % 16] + 0.01 * randn(80, 8, seed=s) for s in range(4)]
    a, b, c = make(8, 16), make(8, 16), make(8, 16)
    a.init_codebook(batches)
    b.init_codebook(iter(batches))
    c.init_codebook(torch.cat(batches))
    assert torch.equal(a.codebook, b.codebook)
    assert torch.equal(a.codebook, c.codebook)
    random_tokens = make(8, 16)
    random_tokens.init_codebook(batches, iterations=0)
    everything = torch.cat(batches)
    assert inertia(a, everything) < 0.7 * inertia(random_tokens, everything)
    assert len(vq.nearest(everything, a.codebook)[0].unique()) == 16
    torch.testing.assert_close(a.embed_sum, a.codebook * a.cluster_size[:, None])


def test_init_codebook_is_as_good_as_a_textbook_k_means():
    x = randn(800, 4)
    module = make(4, 20)
    module.init_codebook(x, iterations=20)
    best = min(_lloyd(x, 20, seed) for seed in range(3))
    assert inertia(module, x) < 1.1 * best


def _lloyd(x: Tensor, k: int, seed: int) -> float:
    centers = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(20):
        nearest = torch.cdist(x, centers).argmin(dim=1)
        centers = torch.stack([x[nearest == i].mean(dim=0) for i in range(k)])
    return torch.cdist(x, centers).min(dim=1).values.square().mean().item()


@pytest.mark.parametrize("options", [{"metric": "cosine"}, {"codebook_dim": 3}, {"update": "gradient"}], ids=str)
def test_init_codebook_with_other_options(options: dict):
    module = make(8, 16, channels="first", **options)
    batches = [randn(2, 8, 5, 5, seed=s) for s in range(3)]
    module.init_codebook(batches)
    module.eval()
    usage = torch.stack([module(batch).usage for batch in batches])
    assert usage.min() > 0.7
    assert module(torch.cat(batches)).usage == 1
    if module.options.metric == "cosine":
        torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(16))


def test_init_codebook_ignores_bad_tokens_warns_of_few_and_refuses_none():
    x = randn(10, 8)
    x[3] = float("nan")
    module = make(8, 16)
    before = module.codebook.clone()
    with pytest.warns(UserWarning, match="9 tokens for 16 codes"):
        module.init_codebook(x)
    assert torch.isfinite(module.codebook).all()
    assert (module.codebook == before).all(dim=1).sum() == 7  # the codes left over keep their rows
    with pytest.raises(ValueError, match="batches: expected at least one finite token"):
        module.init_codebook([])


def test_kmeans_init_runs_on_the_first_training_batch_only():
    module, explicit = make(kmeans_init=True), make()
    x = randn(200, 8)
    module.eval()(x)
    assert torch.equal(module.codebook, explicit.codebook)
    assert not module.initialized
    module.train()(x)
    explicit.init_codebook(x)
    assert torch.equal(module.codebook, explicit.codebook)
    assert module.initialized
    explicit(x)
    module.update_codebook()
    explicit.update_codebook()
    assert torch.equal(module.codebook, explicit.codebook)


def test_a_resumed_codebook_is_not_initialised_again():
    module, fresh = make(kmeans_init=True), make(kmeans_init=True)
    module(randn(200, 8))
    fresh.load_state_dict(module.state_dict())
    before = fresh.state_dict()["embed_sum"].clone()
    fresh(randn(200, 8, seed=1))
    assert torch.equal(fresh.embed_sum, before)


# ---- metrics ----


def test_usage_and_perplexity_look_back_over_the_window():
    module = make(2, 8, usage_window=4, ema_decay=0.999999)
    rows = module.codebook.clone()
    outputs = [module(rows[i : i + 1]) for i in (0, 1, 2, 3, 3, 3, 3)]
    assert [round(out.usage.item() * 8) for out in outputs] == [1, 2, 3, 4, 3, 2, 1]
    weights = torch.tensor([0.75**3, 0.75**2, 0.75, 1.0])
    expected = torch.distributions.Categorical(weights).entropy().exp()
    torch.testing.assert_close(outputs[3].perplexity, expected, rtol=1e-4, atol=0)
    assert outputs[0].perplexity == 1


def test_in_eval_usage_and_perplexity_are_of_the_batch():
    module = make(2, 8).eval()
    out = module(module.codebook[[0, 1, 2, 2, 2, 2, 3, 0]])
    assert out.usage == 0.5
    expected = torch.distributions.Categorical(torch.tensor([2.0, 1, 4, 1])).entropy().exp()
    torch.testing.assert_close(out.perplexity, expected)
    assert module.step == 0


# ---- the same bits ----


def three_steps(options: dict, threads: int) -> dict[str, Tensor]:
    """Outputs, gradients and state of a training run that is large enough for several threads."""
    torch.set_num_threads(threads)
    module = make(16, 150, **options)
    results = {}
    for step in range(3):
        x = (randn(2, 2500, 16, seed=step) * (1 + step)).requires_grad_()
        out = module(x, randn(2, 2500, seed=9 + step) > -1)
        (out.quantized.square().sum() + out.loss).backward()
        results |= {f"{name} {step}": value.detach() for name, value in [*vars(out).items(), ("dx", x.grad)]}
    gradients = {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    return results | gradients | module.state_dict()


@every_option
def test_every_number_of_threads_and_every_run_gives_the_same_bits(options: dict):
    one, two, again = (three_steps(options, threads) for threads in (1, 2, 2))
    for name, value in two.items():
        assert torch.equal(value, again[name]), name
        if "codebook_dim" not in options:  # the projections are torch's, whose sums depend on threads
            assert torch.equal(value, one[name]), name

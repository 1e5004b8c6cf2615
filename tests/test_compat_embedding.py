"""compat's VectorQuantizer and VectorQuantizer2 against diffusers and taming's contract; diffusers' VQModel."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from peers import UNIT, TamingQuantizer, assert_codes_equal_but_for_farther, mean_tolerance, row_tolerance
from torch import Tensor, nn

import vqkernels as vq
from vqkernels import compat

DIM, CODES = 4, 64
USED = [7, 3, 11, 40, 41, 60]
PEERS = {"taming": TamingQuantizer, "diffusers": DiffusersQuantizer}
OPTIONS = {
    "legacy": {},
    "fixed": {"legacy": False},
    "sane": {"sane_index_shape": True},
    "remap": {"remap": "used.npy", "unknown_index": 2},
    "remap-extra-sane": {"remap": "used.npy", "unknown_index": "extra", "sane_index_shape": True},
}
every_peer = pytest.mark.parametrize("kind", PEERS)


@pytest.fixture(autouse=True)
def _used_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    numpy.save("used.npy", numpy.array(USED))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """The peer with codes as far apart as tokens, and a copy of it that was swapped."""
    torch.manual_seed(0)
    old = PEERS[kind](CODES, DIM, 0.25, **options)
    old.embedding.weight.data.normal_()
    new = nn.Sequential(copy.deepcopy(old))
    vq.replace_quantizers(new, strict=True)
    return old, new[0]


def step(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z_q, loss, indices, dz, dcodebook of one forward and backward."""
    z = z.clone().requires_grad_()
    z_q, loss, (perplexity, encodings, indices) = module(z)
    assert perplexity is None
    assert encodings is None
    gradients = torch.autograd.grad((z_q * randn(*z.shape, seed=9).to(z)).sum() + loss, (z, module.embedding.weight))
    return z_q.detach(), loss.detach(), indices, *gradients


@every_peer
@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_gives_what_the_peer_gives(kind: str, option: str):
    old, new = pair(kind, **OPTIONS[option])
    for training in (True, False):
        old.train(training), new.train(training)
        z = randn(2, DIM, 5, 6, seed=int(training))
        theirs, ours = step(old, z), step(new, z)
        assert torch.equal(theirs[2], ours[2])  # no token here is nearly as far from two codes
        tokens, codebook = z.movedim(1, -1).flatten(0, 2), old.embedding.weight.detach()
        rows = row_tolerance(tokens, codebook, rotation=False)
        loss = mean_tolerance(z.numel(), float(tokens.abs().max() + codebook.abs().max()) ** 2)
        most = vq.nearest(tokens, codebook)[0].bincount().max()  # tokens that a row of dcodebook is the sum of
        for a, b, atol in zip(theirs, ours, (rows, loss, 0, rows, int(most) * rows), strict=True):
            assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, b.is_contiguous())
            torch.testing.assert_close(b, a, rtol=0, atol=atol)
        assert ours[0].stride() == theirs[0].stride()


@every_peer
def test_codebook_entries_are_the_peers(kind: str):
    shape = (2, 5, 6, DIM)
    for options in ({}, {"sane_index_shape": True}, OPTIONS["remap-extra-sane"]):
        old, new = pair(kind, **options)
        indices = step(new, randn(2, DIM, 5, 6))[2]
        assert torch.equal(new.get_codebook_entry(indices, shape), old.get_codebook_entry(indices, shape))
    old, new = pair(kind)
    assert torch.equal(new.get_codebook_entry(torch.arange(9), None), old.get_codebook_entry(torch.arange(9), None))


def test_random_places_of_unknown_codes_are_in_range():
    _, new = pair("taming", remap="used.npy", unknown_index="random")
    codes = new.remap_to_used(torch.arange(CODES)[None])
    assert codes[0, USED].tolist() == list(range(len(USED)))
    assert codes.min() >= 0 and codes.max() < len(USED)  # noqa: PT018


@every_peer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(kind: str, dtype: torch.dtype):
    old, new = pair(kind)
    old, new = old.to(dtype), new.to(dtype)
    z = randn(2, DIM, 5, 6).to(dtype)
    ours = step(new, z)
    rows = new.embedding.weight[ours[2]].view(2, 5, 6, DIM).movedim(-1, 1)
    assert torch.equal(ours[0], rows)
    assert all(each.dtype == dtype for each in (*ours[:2], *ours[3:]))
    if kind == "diffusers" and dtype != torch.float64:
        return  # its cdist has no half precision on CPU
    theirs = step(old, z)
    same = (theirs[2] == ours[2]).view(2, 1, 5, 6)
    tokens = z.movedim(1, -1).flatten(0, 2)
    assert_codes_equal_but_for_farther(theirs[2], ours[2], tokens, new.embedding.weight.detach())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0] * same, theirs[0] * same, rtol=0, atol=4 * unit * float(z.abs().max() + 4))
    assert theirs[1].dtype == ours[1].dtype


@every_peer
def test_autocast_changes_no_code_and_gives_the_peers_dtypes(kind: str):
    old, new = pair(kind)
    z = randn(2, DIM, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = step(old, z), step(new, z)
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert torch.equal(ours[2], step(new, z.float())[2])


def test_farther_codes_of_the_peer_are_not_repeated():
    """At distance 200 from the origin the published formula loses what tells codes apart; cdist's does as well."""
    counts = {}
    for kind in PEERS:
        old, new = pair(kind)
        with torch.no_grad():
            old.embedding.weight += 200
            new.embedding.weight += 200
        z = randn(2, DIM, 30, 30) + 200
        tokens = z.movedim(1, -1).flatten(0, 2)
        codes = old(z)[2][2], new(z)[2][2]
        counts[kind] = assert_codes_equal_but_for_farther(*codes, tokens, new.embedding.weight.detach())
    print(f"farther codes of 1800: {counts}")
    assert counts["taming"] > 0


@every_peer
def test_one_graph_and_the_same_numbers_compiled(kind: str):
    torch._dynamo.reset()
    _, new = pair(kind, remap="used.npy", unknown_index=2, sane_index_shape=True)
    fast = torch.compile(copy.deepcopy(new), fullgraph=True, backend="aot_eager")
    z = randn(2, DIM, 5, 6, seed=3).requires_grad_()
    for a, b in zip(new(z)[:2], fast(z)[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(new(z)[2][2], fast(z)[2][2])


def test_a_broken_token_has_no_code():
    _, new = pair("taming")
    z = randn(1, DIM, 2, 2)
    z[0, 0, 1, 1] = torch.nan
    z_q, _, (_, _, indices) = new(z)
    assert indices.tolist()[3] == -1
    assert z_q[0, :, 1, 1].isnan().all()
    assert not z_q[0, :, 0].isnan().any()


def test_arguments_are_checked():
    _, new = pair("taming")
    z = randn(1, DIM, 2, 2)
    for arguments in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            new(z, **arguments)
    with pytest.raises(ValueError, match=r"z: expected \[B, 4, H, W\]"):
        new(z.movedim(1, -1))


@every_peer
def test_a_fresh_drop_in_starts_like_the_peer(kind: str):
    ours = {"taming": compat.VectorQuantizer2, "diffusers": compat.VectorQuantizer}[kind]
    states = []
    for make in (PEERS[kind], ours):
        torch.manual_seed(3)
        states.append(make(CODES, DIM, 0.25, remap="used.npy").state_dict())
    assert states[0]["embedding.weight"].abs().max() <= 1 / CODES
    assert states[1]["embedding.weight"].abs().max() <= 1 / CODES
    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}


# ---- diffusers' VQModel ----


def make_model(**options: object) -> VQModel:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16,), "latent_channels": DIM, "num_vq_embeddings": CODES, "norm_num_groups": 4}
    model = VQModel(**sizes, **options, mid_block_add_attention=False)
    model.quantize.embedding.weight.data.normal_(std=0.5)  # so that more than a few codes are used
    return model


def swapped_copy(model: VQModel) -> VQModel:
    model = copy.deepcopy(model)
    assert vq.replace_quantizers(model, strict=True).swapped == {"quantize": "diffusers VectorQuantizer"}
    return model


def train(
    model: VQModel, steps: int = 10, disturbance: float = 0.0, seed: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """(losses, last output, last gradients, parameters), indices of every step.

    ``disturbance``: relative noise on the rows and the loss that the quantizer returns.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    noise, indices = torch.Generator().manual_seed(seed), []

    def watch(_module: nn.Module, _args: object, out: tuple) -> tuple:
        indices.append(out[2][2])
        z_q, loss = (t * (1 + disturbance * torch.randn(t.shape, generator=noise).to(t)) for t in out[:2])
        return z_q, loss, out[2]

    handle = model.quantize.register_forward_hook(watch)
    losses = []
    for step in range(steps):
        x = randn(2, 3, 16, 16, seed=step).to(model.dtype)
        optimizer.zero_grad()
        out = model(x)
        loss = (out.sample - x).square().mean() + out.commit_loss
        loss.backward()
        if step + 1 < steps:
            optimizer.step()
        losses.append(loss.detach())
    handle.remove()
    parameters = list(model.parameters())
    return [
        torch.stack(losses),
        out.sample.detach(),
        *(p.grad for p in parameters),
        *(p.data for p in parameters),
    ], indices


def test_vqmodel_trains_in_float64_as_before():
    """The same function: what is left in float64 is its rounding, 2^-52, grown by a network of a few dozen layers and
    by ten steps of an optimiser that divides gradients by their own size; in float32 it would be 2^29 times as much."""
    model = make_model().double()
    theirs, ours = train(copy.deepcopy(model)), train(swapped_copy(model))
    assert all(torch.equal(a, b) for a, b in zip(theirs[1], ours[1], strict=True))
    for a, b in zip(theirs[0], ours[0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2.0**-35 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("steps", [1, 10])
def test_vqmodel_in_float32_agrees_as_nearly_as_the_peer_agrees_with_itself(steps: int):
    """The yardstick: the peer's model with the rows and the loss of its quantizer disturbed by four units of roundoff,
    two roundings of z + (row - z), each up to twice a row's own; and sums of a few tokens in another order."""
    model = make_model()
    theirs = train(copy.deepcopy(model), steps)
    disturbed = [train(copy.deepcopy(model), steps, 4 * UNIT, seed)[0] for seed in range(5, 8)]  # one may be lucky
    ours = train(swapped_copy(model), steps)
    assert all(torch.equal(a, b) for a, b in zip(theirs[1], ours[1], strict=True))
    for *moved, a, b in zip(*disturbed, theirs[0], ours[0], strict=True):
        spread = max(float((each.double() - a.double()).abs().max()) for each in moved)
        torch.testing.assert_close(b, a, rtol=0, atol=4 * spread + 16 * UNIT * float(a.double().abs().max()))


def test_vqmodel_saves_and_loads_both_ways(tmp_path: Path):
    model = make_model()
    swapped = swapped_copy(model)
    train(swapped, 2)
    swapped.save_pretrained(tmp_path / "model")
    loaded = VQModel.from_pretrained(tmp_path / "model")  # diffusers' own quantizer again
    assert type(loaded.quantize) is DiffusersQuantizer
    again = swapped_copy(loaded)
    assert not again.training  # as from_pretrained leaves it
    x = randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x).sample, swapped.eval()(x).sample)
        latents = swapped.encode(x).latents
        theirs, ours = loaded.decode(latents), swapped.decode(latents)
        torch.testing.assert_close(ours.sample, theirs.sample, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.commit_loss, theirs.commit_loss)
        arguments = {"force_not_quantize": True, "return_dict": False}
        assert torch.equal(swapped.decode(latents, **arguments)[0], loaded.decode(latents, **arguments)[0])
    model.load_state_dict(swapped.state_dict())
    swapped.load_state_dict(make_model().state_dict())


def test_vqmodel_looks_up_codes():
    model = make_model(lookup_from_codebook=True)
    swapped = swapped_copy(model)
    codes = torch.arange(2 * 16) % CODES
    arguments = {"force_not_quantize": True, "shape": (2, 4, 4, DIM)}
    assert torch.equal(swapped.decode(codes, **arguments).sample, model.decode(codes, **arguments).sample)


def test_a_swapped_vqmodel_is_one_graph():
    torch._dynamo.reset()
    model = swapped_copy(make_model())
    x = randn(1, 3, 16, 16)
    fast, plain = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    torch.testing.assert_close(fast.sample, plain.sample)
    torch.testing.assert_close(fast.commit_loss, plain.commit_loss)

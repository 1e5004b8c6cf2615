"""compat.VectorQuantize against vector-quantize-pytorch itself: every option, step by step, and ten steps in a row."""

from __future__ import annotations

import copy

import pytest
import torch
import vector_quantize_pytorch as peer
from peers import UNIT, assert_codes_equal_but_for_farther, mean_tolerance, row_tolerance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqkernels as vq
from vqkernels import compat

DIM, CODES = 8, 32
SEQUENCE, FIRST, IMAGE, VIDEO, ONE = (2, 30, DIM), (2, DIM, 30), (2, DIM, 5, 6), (2, DIM, 2, 3, 5), (60, DIM)
# options of the constructor, shape of x, arguments of the call
CASES: dict[str, tuple[dict, tuple[int, ...], dict]] = {
    "plain": ({}, SEQUENCE, {}),
    "one-token": ({}, ONE, {}),
    "cosine": ({"use_cosine_sim": True}, SEQUENCE, {}),
    "projection": ({"codebook_dim": 5}, SEQUENCE, {}),
    "layernorm": ({"codebook_dim": 5, "layernorm_after_project_in": True}, SEQUENCE, {}),
    "cosine-projection": ({"use_cosine_sim": True, "codebook_dim": 5}, SEQUENCE, {}),
    "channel-first": ({"channel_last": False}, FIRST, {}),
    "image": ({"accept_image_fmap": True, "codebook_dim": 5}, IMAGE, {}),
    "video": ({"accept_3d_fmap": True}, VIDEO, {}),
    "straight-through": ({"rotation_trick": False}, SEQUENCE, {}),
    "gumbel-straight-through": ({"rotation_trick": False, "straight_through": True}, SEQUENCE, {}),
    "frozen": ({"freeze_codebook": True}, SEQUENCE, {}),
    "frozen-call": ({}, SEQUENCE, {"freeze_codebook": True}),
    "no-ema": ({"ema_update": False}, SEQUENCE, {}),
    "no-ema-call": ({}, SEQUENCE, {"ema_update": False}),
    "manual": ({"manual_ema_update": True}, SEQUENCE, {}),
    "decay": ({"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25}, SEQUENCE, {}),
    "no-commitment": ({"commitment_weight": 0.0}, SEQUENCE, {}),
    "not-routed": ({"route_gradients_to_input": False}, SEQUENCE, {}),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, SEQUENCE, {}),
    "learnable-frozen": ({"learnable_codebook": True, "ema_update": False}, SEQUENCE, {"freeze_codebook": True}),
    "learnable-not-routed": (
        {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
        SEQUENCE,
        {},
    ),
    "mask": ({}, SEQUENCE, {"mask": torch.arange(60).view(2, 30) % 7 != 3}),
    "mask-input-kept": ({"return_zeros_for_masked_padding": False}, SEQUENCE, {"lens": torch.tensor([11, 30])}),
    "mask-cosine": ({"use_cosine_sim": True}, SEQUENCE, {"lens": torch.tensor([11, 30])}),
    "mask-channel-first": (
        {"channel_last": False, "rotation_trick": False},
        FIRST,
        {"mask": torch.arange(60).view(2, 30) % 7 != 3},  # with lens the peer counts channels here
    ),
    "mask-learnable": ({"learnable_codebook": True, "ema_update": False}, SEQUENCE, {"lens": torch.tensor([3, 29])}),
}
every_case = pytest.mark.parametrize("case", CASES)


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """The peer, and a copy of it that was swapped."""
    torch.manual_seed(0)
    old = peer.VectorQuantize(DIM, CODES, **options)
    rows = old._codebook.embed.detach()
    if not options.get("use_cosine_sim"):
        rows.copy_(torch.randn_like(rows))
    old._codebook.embed_avg.copy_(rows)
    new = nn.Sequential(copy.deepcopy(old))
    vq.replace_quantizers(new, strict=True)
    return old, new[0]


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(module: nn.Module, x: Tensor, arguments: dict) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """quantized, indices, loss and every gradient of one forward and backward."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    quantized, indices, loss = module(x, **arguments)
    ((quantized * randn(quantized.shape, 99)).sum() + loss).backward()
    gradients = {"x": x.grad} | {name: each.grad for name, each in module.named_parameters()}
    return quantized.detach(), indices, loss.detach(), {k: v for k, v in gradients.items() if v is not None}


def tokens_of(module: nn.Module, x: Tensor) -> Tensor:  # [N, D] as they are searched
    with torch.no_grad():
        return module._codebook_tokens(module._tokens(x)).flatten(0, 1)


def tolerances(module: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Of rows and gradients, of the loss, and of the state after a step.

    Rows as in ``row_tolerance``, times the numbers of ``step`` that weigh them; a projection adds up DIM of them, its
    own gradient one for each token. A code is a sum of up to `most` tokens, decayed, over a size.
    """
    tokens, codebook = tokens_of(module, x), module.codebook.detach()
    weight = max(1.0, float(randn((2, 8, 5, 6), 99).abs().max()), float(x.abs().max()))
    adds = max(DIM, len(tokens)) if module.has_projections else 1
    rows = adds * weight * row_tolerance(tokens, codebook, rotation=module.rotation_trick)
    largest = float(max(tokens.abs().max(), codebook.abs().max(), x.abs().max()))
    most = int(vq.nearest(tokens, codebook)[0].bincount().max())
    held = float(module._codebook.embed_avg.abs().max()) + most * largest
    smallest = min(1.0, float(module._codebook.cluster_size.min()) * module._codebook.options.decay)
    return rows, mean_tolerance(tokens.numel(), (2 * largest) ** 2), (most + 8) * UNIT * held / smallest


@every_case
def test_a_step_gives_what_the_peer_gives(case: str):
    """In training and in eval: results, gradients and the state after it, each of three steps from the same state."""
    options, shape, arguments = CASES[case]
    old, new = pair(**options)
    for seed in range(3):
        x = randn(shape, seed)
        new.load_state_dict(old.state_dict())
        allowed, before, tokens = tolerances(new, x), new.codebook.detach().clone(), tokens_of(new, x)
        theirs, ours = step(old, x, arguments), step(new, x, arguments)
        assert ours[1].shape == theirs[1].shape
        assert ours[1].dtype == torch.int64
        real = (theirs[1] >= 0).flatten()
        assert torch.equal(ours[1].flatten() >= 0, real)
        metric = "cosine" if new.use_cosine_sim else "euclidean"
        chosen = theirs[1].flatten()[real], ours[1].flatten()[real]
        assert assert_codes_equal_but_for_farther(*chosen, tokens[real], before, metric) == 0
        for a, b, atol in ((theirs[0], ours[0], allowed[0]), (theirs[2], ours[2], allowed[1])):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(b, a, rtol=0, atol=atol)
        assert ours[3].keys() == theirs[3].keys()
        for name, gradient in ours[3].items():
            torch.testing.assert_close(gradient, theirs[3][name], rtol=0, atol=allowed[0], msg=name)
        for name, value in old.state_dict().items():
            torch.testing.assert_close(new.state_dict()[name], value, rtol=0, atol=allowed[2], msg=name)
    old.eval(), new.eval()
    for a, b in zip(old(x, **arguments), new(x, **arguments), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerances(new, x)[0])
        assert not b.requires_grad or a.requires_grad


def test_eval_gives_the_codes_bit_for_bit_and_no_loss():
    old, new = pair()
    old.eval(), new.eval()
    x = randn(SEQUENCE, 0).requires_grad_()
    theirs, ours = old(x, return_loss_breakdown=True), new(x, return_loss_breakdown=True)
    for a, b in zip(theirs[:3], ours[:3], strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert ours[3]._fields == theirs[3]._fields
    assert all(each == 0 for each in ours[3])


def test_loss_breakdown_and_input_without_gradient():
    for options in ({}, {"learnable_codebook": True, "ema_update": False}, {"codebook_dim": 5}):
        old, new = pair(**options)
        x = randn(SEQUENCE, 0)
        theirs, ours = old(x, return_loss_breakdown=True), new(x, return_loss_breakdown=True)
        torch.testing.assert_close(ours[3].commitment, theirs[3].commitment, rtol=0, atol=mean_tolerance(480, 64.0))
        assert [each.requires_grad for each in ours[:3]] == [each.requires_grad for each in theirs[:3]]
        for out in (theirs, ours):
            (out[0].square().sum() + out[2]).backward()
        for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=DIM * tolerances(new, x)[0])


def test_cross_entropy_of_given_codes():
    for options in ({}, {"use_cosine_sim": True}):
        old, new = pair(**options)
        x, given = randn(SEQUENCE, 0), torch.arange(60).view(2, 30) % CODES
        given[0, 3] = -1
        grads = []
        results = []
        for module, frozen in ((old, True), (new, False)):  # a codebook that learns meanwhile changes nothing in ours
            leaf = x.clone().requires_grad_()
            quantized, entropy = module(leaf, indices=given, freeze_codebook=frozen)
            grads.append(torch.autograd.grad(entropy, leaf)[0])
            results.append((quantized.detach(), entropy.detach()))
        # a distance of two tokens at length 10 has an error of about 100 units; the gradient divides by distances > 0.5
        for a, b in [*zip(*results, strict=True), grads]:
            torch.testing.assert_close(b, a, rtol=0, atol=400 * UNIT * 8)


def test_manual_update_update_indices_and_lookups():
    old, new = pair(manual_ema_update=True, codebook_dim=5)
    x, given = randn(SEQUENCE, 0), torch.arange(60).view(2, 30) % CODES
    mask = given % 5 != 1
    with torch.no_grad():
        for module in (old, new):
            module.update_indices(x, given, mask=mask)
            module._codebook.update_ema()
    for name, value in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], value, rtol=0, atol=tolerances(new, x)[2], msg=name)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.codebook, old.codebook)
    for name in ("get_codes_from_indices", "get_output_from_indices"):
        assert torch.equal(getattr(new, name)(given), getattr(old, name)(given))
    old, new = pair(accept_image_fmap=True)
    indices = given.view(2, 5, 6)
    assert torch.equal(new.get_output_from_indices(indices), old.get_output_from_indices(indices))


def test_farther_codes_of_the_peer_are_not_repeated(capsys: pytest.CaptureFixture[str]):
    """Tokens and codes far from the origin: |x|^2 + |c|^2 - 2 x.c loses in float32 what tells two codes apart."""
    old, new = pair()
    new.codebook = old.codebook = old.codebook.detach() + 300
    x = randn((4, 500, DIM), 1) + 300
    old.eval(), new.eval()
    theirs, ours = old(x)[1].flatten(), new(x)[1].flatten()
    farther = assert_codes_equal_but_for_farther(theirs, ours, x.flatten(0, 1), new.codebook)
    print(f"the peer's code is farther for {farther} of {theirs.numel()} tokens")
    assert 0 < farther < theirs.numel()


# ---- what draws random tokens: ours draws others ----


def test_dead_codes_restart_at_different_tokens_of_the_batch():
    old, new = pair(threshold_ema_dead_code=0.9)
    x, mask = randn(SEQUENCE, 0), torch.arange(60).view(2, 30) % 2 == 0
    theirs, ours = step(old, x, {"mask": mask}), step(new, x, {"mask": mask})
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerances(new, x)[0])  # codes from before the restart
    dead = torch.isin(old.codebook, x).all(1)
    assert 0 < dead.sum() < CODES
    assert torch.equal(torch.isin(new.codebook, x[mask]).all(1), dead)
    assert len(new.codebook[dead].unique(dim=0)) == dead.sum()
    torch.testing.assert_close(new._codebook.cluster_size, old._codebook.cluster_size)
    torch.testing.assert_close(new.codebook[~dead], old.codebook[~dead], rtol=0, atol=tolerances(new, x)[2])
    torch.testing.assert_close(new._codebook.embed_avg[0, dead], new.codebook[dead] * 0.9)


def test_more_dead_codes_than_tokens_restart_over_several_steps():
    _, new = pair(threshold_ema_dead_code=2.0)
    x = randn((1, 10, DIM), 0)
    new(x)
    assert torch.isin(new.codebook, x).all(1).sum() == 10


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_kmeans_runs_in_the_first_forward_as_the_peers_does(mode: str):
    centres = 10 * randn((CODES, DIM), 1)
    x = (centres.repeat(8, 1) + 0.01 * randn((8 * CODES, DIM), 2))[None]
    old, new = pair(kmeans_init=True, freeze_codebook=mode == "frozen")
    for module in (old, new):
        module._codebook.embed.zero_()
        module.train(mode != "eval")
    errors = [(module(x)[0].detach() - x).square().sum(-1).mean() for module in (old, new)]
    assert new._codebook.initted
    assert errors[1] <= 1.5 * errors[0]  # another random start: about as good a fit
    rows = new._codebook.embed.clone()
    new.eval()(x + 1)
    assert torch.equal(rows, new._codebook.embed)
    new.load_state_dict({**new.state_dict(), "_codebook.initted": torch.tensor(False)})
    new(x + 1)
    assert not torch.equal(rows, new._codebook.embed)


# ---- a model around it ----


class Autoencoder(nn.Module):
    """A small model with a quantizer in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, DIM))
        self.quantizer = peer.VectorQuantize(DIM, CODES, codebook_dim=4, commitment_weight=0.25)
        self.decoder = nn.Sequential(nn.Linear(DIM, 32), nn.SiLU(), nn.Linear(32, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, N, 12]
        quantized, indices, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, loss


def train(model: Autoencoder, disturbance: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Ten steps: (losses and last gradients), indices. ``disturbance`` is applied to the encoder's output."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    noise = torch.Generator().manual_seed(5)

    def disturb(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return out * (1 + disturbance * torch.randn(out.shape, generator=noise))

    handle = model.encoder.register_forward_hook(disturb)
    losses, indices = [], []
    for seed in range(10):
        x = randn((4, 50, 12), seed)
        optimizer.zero_grad()
        out, codes, commitment = model(x)
        loss = (out - x).square().mean() + commitment
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        indices.append(codes)
    handle.remove()
    gradients = [each.grad for each in model.parameters()]
    return [torch.stack(losses), *gradients, *(each.detach() for each in model.state_dict().values())], indices


def test_ten_steps_of_a_model_agree_as_nearly_as_the_peer_agrees_with_itself():
    """The yardstick: the same ten steps of the peer with its tokens disturbed by float32's roundoff, six units, which
    is less than its rotation loses (``row_tolerance``); and sums of tokens in another order."""
    torch.manual_seed(0)
    start = Autoencoder()
    swapped = copy.deepcopy(start)
    vq.replace_quantizers(swapped, strict=True)
    disturbed, theirs, ours = train(copy.deepcopy(start), 6 * UNIT), train(start), train(swapped)
    assert all(torch.equal(a, b) for a, b in zip(theirs[1], ours[1], strict=True))
    for moved, a, b in zip(disturbed[0], theirs[0], ours[0], strict=True):
        spread = float((moved.double() - a.double()).abs().max())
        torch.testing.assert_close(b, a, rtol=0, atol=4 * spread + 16 * UNIT * float(a.double().abs().max()))
    back = Autoencoder()
    back.load_state_dict(swapped.state_dict())
    swapped.load_state_dict(start.state_dict())


def test_an_optimizer_made_before_the_swap_goes_on():
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vq.replace_quantizers(model, strict=True)
    before = model.quantizer.project_in.weight.clone()
    out, _, loss = model(randn((2, 9, 12), 0))
    (out.sum() + loss).backward()
    optimizer.step()
    assert not torch.equal(before, model.quantizer.project_in.weight)


def test_activation_checkpointing_counts_a_step_once():
    _, plain = pair()
    again = copy.deepcopy(plain)
    for seed in range(3):
        x = randn(SEQUENCE, seed)
        plain(x.requires_grad_())[0].sum().backward()
        checkpoint(lambda t: again(t)[0], x, use_reentrant=False).sum().backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_module(dtype: torch.dtype):
    old, new = pair(codebook_dim=5)
    old, new = old.to(dtype), new.to(dtype)
    x = randn(SEQUENCE, 0).to(dtype)
    theirs, ours = step(old, x, {}), step(new, x, {})
    # one rounding of a row in this dtype, a dozen in the projections, none below float32's (the peer's codebook's)
    unit = max(torch.finfo(dtype).eps, 32 * UNIT)
    for index in (0, 2):
        assert ours[index].dtype == theirs[index].dtype
        torch.testing.assert_close(ours[index], theirs[index], rtol=16 * unit, atol=16 * unit)
    for name, value in old.state_dict().items():
        assert new.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(new.state_dict()[name], value, rtol=16 * unit, atol=16 * unit, msg=name)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cosine_sim": True, "codebook_dim": 5}, {"threshold_ema_dead_code": 0.9}, {"kmeans_init": True}],
)
def test_one_graph_and_the_same_numbers_compiled(options: dict):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = compat.VectorQuantize(DIM, CODES, **options)
    module = copy.deepcopy(eager)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = randn(SEQUENCE, seed)
        for a, b in zip(step(eager, x, {})[:3], step(fast, x, {})[:3], strict=True):
            torch.testing.assert_close(a, b)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_a_fresh_drop_in_starts_like_the_peer():
    options = {"codebook_dim": 5, "use_cosine_sim": True}
    states = []
    for make in (peer.VectorQuantize, compat.VectorQuantize):
        torch.manual_seed(3)
        states.append(make(DIM, CODES, **options).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_a_call_cannot_ask_is_named():
    _, new = pair()
    x = randn(SEQUENCE, 0)
    for option, value in (("topk", 2), ("codebook_transform_fn", abs), ("accum_ema_update", True)):
        with pytest.raises(NotImplementedError, match=option):
            new(x, **{option: value})
    with pytest.raises(ValueError, match=r"x: expected \[B, N, 8\]"):
        new(randn((2, 30, 7), 0))
    with pytest.raises(ValueError, match="got both"):
        new(x, mask=torch.ones(2, 30, dtype=torch.bool), lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="rotation_trick"):
        compat.VectorQuantize(8, 16, straight_through=True, rotation_trick=True)


def test_masked_and_broken_tokens_leave_no_trace():
    _, new = pair()
    _, clean = pair()
    x, mask = randn(SEQUENCE, 0), torch.ones(2, 30, dtype=torch.bool)
    mask[:, 20:] = False
    spoiled = x.clone()
    spoiled[:, 20:] = torch.nan
    assert torch.equal(new(spoiled, mask=mask)[2], clean(x, mask=mask)[2])
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), clean.state_dict().values(), strict=True))
    nothing = new(x, mask=torch.zeros_like(mask))
    assert nothing[2] == 0
    assert not nothing[0].any()

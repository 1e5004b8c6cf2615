"""replace_quantizers as its user sees it: what is swapped, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import vector_quantize_pytorch as peer
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from peers import TamingQuantizer
from torch import Tensor, nn
from vqkernels.benchmarks import replace
from vqkernels.benchmarks.memory import Peak

import vqkernels as vq
from vqkernels import compat

MAKERS = {
    "vector-quantize-pytorch VectorQuantize": (lambda: peer.VectorQuantize(8, 16), compat.VectorQuantize),
    "diffusers VectorQuantizer": (lambda: DiffusersQuantizer(16, 8, 0.25), compat.VectorQuantizer),
    "taming-transformers VectorQuantizer2": (lambda: TamingQuantizer(16, 8, 0.25), compat.VectorQuantizer2),
}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("name", MAKERS)
def test_the_swapped_module_holds_the_very_tensors_and_modes_of_the_old_one(name: str):
    make, ours = MAKERS[name]
    model = nn.ModuleDict({"a": nn.ModuleList([make()]), "b": make().double().eval()})
    before, state = tensors(model), model.state_dict()
    numbers = torch.get_rng_state()
    report = vq.replace_quantizers(model)
    assert report.swapped == {"a.0": name, "b": name}
    assert report.left == {}
    assert torch.equal(numbers, torch.get_rng_state())
    assert type(model["a"][0]) is ours
    assert [each.training for each in (model["a"][0], model["b"])] == [True, False]
    assert list(model.state_dict()) == list(state)
    assert all(before[key] is tensor for key, tensor in tensors(model).items())  # an optimiser made before goes on


@pytest.mark.parametrize("name", MAKERS)
def test_state_dicts_load_both_ways_and_modules_pickle(name: str):
    make, _ = MAKERS[name]
    old, model = nn.Sequential(make()), nn.Sequential(make())
    vq.replace_quantizers(model)
    model.load_state_dict(old.state_dict())
    back = nn.Sequential(make())
    back.load_state_dict(copy.deepcopy(pickle.loads(pickle.dumps(model))).state_dict())
    for key, tensor in old.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key])


def test_a_module_in_two_places_stays_one():
    shared = peer.VectorQuantize(8, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert len(vq.replace_quantizers(model).swapped) == 1
    assert model["a"] is model["b"][0]


UNSUPPORTED = {
    "heads": {"heads": 2, "codebook_dim": 4},
    "separate_codebook_per_head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "commitment_use_cross_entropy_loss": {"commitment_use_cross_entropy_loss": True},
    "orthogonal_reg_weight": {"orthogonal_reg_weight": 0.1},
    "codebook_diversity_loss_weight": {"codebook_diversity_loss_weight": 0.1},
    "stochastic_sample_codes": {"stochastic_sample_codes": True},
    "straight_through": {"straight_through": True, "rotation_trick": False, "codebook_dim": 4},
    "directional_reparam": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "sync_update_v": {"sync_update_v": 0.1, "learnable_codebook": True, "ema_update": False},
    "vq_bridge": {"vq_bridge": nn.Identity()},
    "affine_param": {"affine_param": True},
    "in_place_codebook_optimizer": {
        "in_place_codebook_optimizer": torch.optim.SGD,
        "learnable_codebook": True,
        "ema_update": False,
    },
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_every_option_that_ours_has_not_is_named_and_the_module_left(option: str):
    module = peer.VectorQuantize(8, 16, **UNSUPPORTED[option])
    model = nn.Sequential(module)
    report = vq.replace_quantizers(model)
    assert report.swapped == {}
    assert option in report.left["0"]
    assert option in str(report)
    assert model[0] is module


def test_codes_not_of_length_one_are_no_cosine_codebook():
    module = peer.VectorQuantize(8, 16, use_cosine_sim=True)
    module.codebook = 2 * module.codebook
    assert "length 1" in vq.replace_quantizers(nn.Sequential(module)).left["0"]


def test_what_sits_on_the_instance_is_not_lost_silently():
    hooked, patched, newer = (peer.VectorQuantize(8, 16) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    newer.an_option_of_next_year = True
    report = vq.replace_quantizers(nn.ModuleList([hooked, patched, newer]))
    for path, reason in (("0", "forward_hooks"), ("1", "forward"), ("2", "an_option_of_next_year")):
        assert reason in report.left[path]


class Sampling(peer.VectorQuantize):
    """Somebody's subclass."""


class OtherImages(DiffusersQuantizer):
    """Somebody's subclass."""


def test_subclasses_are_left_and_from_peer_refuses_what_would_be_left():
    modules = [Sampling(8, 16), OtherImages(16, 8, 0.25)]
    report = vq.replace_quantizers(nn.ModuleList(modules))
    assert ["subclass" in reason for reason in report.left.values()] == [True, True]
    for module, ours in zip(modules, (compat.VectorQuantize, compat.VectorQuantizer), strict=True):
        with pytest.raises(ValueError, match="subclass"):
            ours.from_peer(module)
    with pytest.raises(ValueError, match="its z_q differs"):
        compat.VectorQuantizer2.from_peer(Normalizing(16, 8, 0.25))


class Renamed(TamingQuantizer):
    """Somebody's copy."""


class Normalizing(TamingQuantizer):
    """Somebody's copy, changed inside."""

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):
        return super().forward(nn.functional.normalize(z, dim=1), temp, rescale_logits, return_logits)


class OtherBeta(TamingQuantizer):
    """Somebody's copy that means the other term: the loss is the same number, its gradient is not."""

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):
        self.legacy = not self.legacy
        result = super().forward(z, temp, rescale_logits, return_logits)
        self.legacy = not self.legacy
        return result


class FlatCodes(TamingQuantizer):
    """Somebody's copy that returns indices of another shape."""

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):
        z_q, loss, (_, _, indices) = super().forward(z, temp, rescale_logits, return_logits)
        return z_q, loss, (None, None, indices[:, None])


class Stranger(nn.Module):
    """A stranger."""


class StrangersQuantizer(Stranger):
    """A stranger that is called a quantizer."""


def test_a_copy_of_taming_is_known_by_its_form_and_a_changed_copy_is_left():
    model = nn.ModuleList(
        [Renamed(16, 8, 0.25), Normalizing(16, 8, 0.25), OtherBeta(16, 8, 0.25), FlatCodes(16, 8, 0.25)]
    )
    report = vq.replace_quantizers(model)
    assert list(report.swapped) == ["0"]
    for path, what in (("1", "z_q"), ("2", "dz"), ("3", "indices")):
        assert f"its {what} " in report.left[path]


def test_a_quantizer_of_an_unknown_class_is_named():
    report = vq.replace_quantizers(nn.ModuleList([Stranger(), StrangersQuantizer()]))
    assert list(report.left) == ["1"]
    assert "StrangersQuantizer" in report.left["1"]


def test_strict_raises_before_anything_is_changed():
    good, bad = peer.VectorQuantize(8, 16), peer.VectorQuantize(8, 16, affine_param=True)
    model = nn.ModuleList([good, bad])
    with pytest.raises(ValueError, match="affine_param"):
        vq.replace_quantizers(model, strict=True)
    assert model[0] is good
    with pytest.raises(ValueError, match="no quantizer found"):
        vq.replace_quantizers(nn.Linear(2, 2), strict=True)
    with pytest.raises(TypeError, match="model: expected"):
        vq.replace_quantizers("model")


def test_a_model_that_is_a_quantizer_itself_has_no_place_for_another():
    module = peer.VectorQuantize(8, 16)
    report = vq.replace_quantizers(module)
    assert "from_peer" in report.left[""]
    assert "(the model itself)" in str(report)
    ours = compat.VectorQuantize.from_peer(module)
    assert ours.codebook.data_ptr() == module.codebook.data_ptr()


def test_ours_are_left_alone_and_an_empty_report_says_so():
    model = nn.Sequential(vq.VectorQuantizer(8, 16), compat.VectorQuantizer2(16, 8, 0.25), compat.VectorQuantize(8, 16))
    report = vq.replace_quantizers(model)
    assert (report.swapped, report.left) == ({}, {})
    assert str(report) == "no quantizer found"


def test_levels_of_a_residual_quantizer_are_swapped_where_it_asks_nothing_special():
    torch.manual_seed(0)
    old = peer.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16)
    model = copy.deepcopy(old)
    assert len(vq.replace_quantizers(model, strict=True).swapped) == 3
    for _ in range(3):
        x = torch.randn(2, 20, 8)
        for a, b in zip(old(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    shared = peer.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, shared_codebook=True)
    assert "shared_codebook" in vq.replace_quantizers(shared).left["layers.0"]


@pytest.mark.parametrize("case", replace.CASES)
def test_the_benchmark_measures_both_models(case: str, monkeypatch: pytest.MonkeyPatch):
    kind, _, tiny = replace.CASES[case]
    monkeypatch.setattr(replace, "CODES", 64)
    monkeypatch.setitem(replace.CASES, case, (kind, tiny, tiny))
    monkeypatch.setattr(replace, "peak_of", lambda *_: Peak(None, "needs a process of its own"))
    result = replace.run_case(case, 1, 0.0)
    assert result["our_code_farther"] == 0
    assert result["codes_that_differ"] == result["peers_code_farther"]
    assert result["loss"]["after"] == pytest.approx(result["loss"]["before"], rel=1e-5)
    assert min(result["step_ms"].values()) > 0
    assert replace.table([result]).row_count == 1

"""frozen_codebook: the results of the module as it is, and no change of its codebook goes unnoticed."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

import vqkernels as vq
from vqkernels.nn.frozen import Freezable
from vqkernels.ops._library import run


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUANTIZERS = {
    "euclidean": lambda: vq.VectorQuantizer(6, 40),
    "cosine": lambda: vq.VectorQuantizer(6, 40, codebook_dim=4, metric="cosine"),
    "gradient": lambda: vq.VectorQuantizer(6, 40, metric="cosine", update="gradient", gradient="rotation"),
    "entropy": lambda: vq.VectorQuantizer(6, 40, entropy=vq.EntropyOptions(weight=0.1)),
    "ibq": lambda: vq.IndexPropagationQuantizer(6, 40, metric="euclidean"),
    "ibq cosine": lambda: vq.IndexPropagationQuantizer(6, 40, metric="cosine", codebook_dim=5),
    "ibq dot": lambda: vq.IndexPropagationQuantizer(6, 40),
    "lfq": lambda: vq.LookupFreeQuantizer(6),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same(name: str, dtype: torch.dtype):
    layer, x = QUANTIZERS[name]().eval(), _randn(3, 9, 6, seed=1).to(dtype)
    x[1, 2, 3] = float("nan")
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.8
    expected = layer(x, mask)
    with vq.frozen_codebook(layer):
        found = layer(x, mask)
        if hasattr(layer, "encode"):
            assert torch.equal(layer.encode(x, mask), expected.codes)
        rows = layer.lookup(expected.codes.clamp(min=0))
    assert torch.equal(rows, layer.lookup(expected.codes.clamp(min=0)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_searches_go_to_the_prepared_codebook(monkeypatch):
    layer, calls = vq.VectorQuantizer(6, 40).eval(), []
    for name in ("nearest", "quantize"):
        module = importlib.import_module(f"vqkernels.ops.{name}")
        monkeypatch.setattr(module, "run", lambda op, *args: calls.append(op) or run(op, *args))
    with vq.frozen_codebook(nn.Sequential(layer)):
        layer.encode(_randn(5, 6, seed=3))
        layer(_randn(5, 6, seed=3))
    layer.encode(_randn(5, 6, seed=3))
    assert calls[:2] == ["nearest_prepared", "nearest_prepared"]
    assert calls[-1] == "nearest"


def _write(layer: vq.VectorQuantizer) -> None:
    with torch.no_grad():
        layer.codebook[3] += 1


def _replace(layer: vq.VectorQuantizer) -> None:
    layer.codebook = layer.codebook.clone()


def _point_elsewhere(layer: vq.VectorQuantizer) -> None:
    layer.codebook.data = layer.codebook.clone()


@pytest.mark.parametrize("change", [_write, _replace, _point_elsewhere, lambda layer: layer.double()])
def test_a_change_that_torch_counts_stops_the_next_search(change):
    layer, x = vq.VectorQuantizer(6, 40).eval(), _randn(5, 6, seed=4)
    with vq.frozen_codebook(layer):
        layer.encode(x)
        change(layer)
        with pytest.raises(RuntimeError, match=r"VectorQuantizer: .* was written to, moved or replaced"):
            layer.encode(x)
        with pytest.raises(RuntimeError, match=r"VectorQuantizer: .* was written to, moved or replaced"):
            layer.lookup(torch.tensor([1]))
        with pytest.raises(RuntimeError, match=r"VectorQuantizer: .* was written to, moved or replaced"):
            layer(x.to(layer.codebook.dtype))
        assert copy.deepcopy(layer)._frozen is None  # a copy is a module of its own
        layer.__dict__.pop("_frozen")  # which the end of the block would complain of
    layer.encode(x)


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_a_write_past_torch_is_not_searched_and_raises_at_the_end(write: str):
    layer, x = vq.VectorQuantizer(6, 40).eval(), _randn(5, 6, seed=5)
    before = layer(x)

    def infer() -> None:
        with vq.frozen_codebook(layer):
            if write == "data":
                layer.codebook.data.neg_()
            else:
                layer.codebook.numpy()[:] *= -1
            now = layer(x)
            assert torch.equal(now.codes, before.codes)
            assert torch.equal(now.quantized, before.quantized)
            assert torch.equal(layer.encode(x), before.codes)
            assert torch.equal(layer.lookup(now.codes), before.quantized)

    with pytest.raises(RuntimeError, match="VectorQuantizer: the codebook was written to inside frozen_codebook"):
        infer()
    assert not torch.equal(layer.encode(x), before.codes)


def test_training_is_refused_and_goes_on_afterwards():
    layer, x = vq.VectorQuantizer(6, 40), _randn(5, 6, seed=6)
    layer(x)  # pending statistics
    before = layer.codebook.clone()
    with vq.frozen_codebook(layer):
        assert not torch.equal(layer.codebook, before)  # applied by opening it
        codes = layer.encode(x)  # in training mode, too
        refused = {
            "training forward": lambda: layer(x),
            "init_codebook": lambda: layer.init_codebook(x),
            "load_state_dict": lambda: layer.load_state_dict(state),
        }
        state = layer.state_dict()
        for what, call in refused.items():
            with pytest.raises(RuntimeError, match=f"VectorQuantizer: expected no {what} inside frozen_codebook"):
                call()
        layer.eval()
        layer.update_codebook()
        with vq.frozen_codebook(layer):  # once more costs nothing and ends nothing
            pass
        assert torch.equal(layer.encode(x), codes)
        assert torch.equal(layer(x).codes, codes)
    layer.train()
    layer(x)
    layer.load_state_dict(state)


def test_pending_statistics_wait_inside_a_deferred_update():
    layer, x = vq.VectorQuantizer(6, 40), _randn(50, 6, seed=7)
    with vq.defer_codebook_update(layer):
        layer(x)
        before = layer.codebook.clone()
        with vq.frozen_codebook(layer):
            layer.encode(x)
            layer.update_codebook()
        assert torch.equal(layer.codebook, before)
        layer(x)
    layer.update_codebook()
    assert not torch.equal(layer.codebook, before)


def test_an_error_inside_leaves_the_module_as_it_was():
    layer, x = vq.VectorQuantizer(6, 40).eval(), _randn(5, 6, seed=8)

    def fail() -> None:
        with vq.frozen_codebook(layer):
            layer.codebook.data.neg_()
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        fail()
    layer.train()(x)
    assert layer._frozen is None
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"), vq.frozen_codebook(3):
        pass


def test_a_bad_codebook_freezes_nothing():
    good, bad = vq.VectorQuantizer(6, 40), vq.VectorQuantizer(6, 40)
    bad.codebook[3, 2] = float("nan")
    both = nn.ModuleList([good, bad])
    with pytest.raises(ValueError, match="codebook: expected finite values"), vq.frozen_codebook(both):
        raise AssertionError
    assert good._frozen is None


def test_compiled_modules_search_the_codebook_as_it_stands():
    layer, x = vq.VectorQuantizer(6, 40).eval(), _randn(5, 6, seed=9)
    compiled = torch.compile(layer.encode, fullgraph=True, backend="eager")
    with vq.frozen_codebook(layer):
        assert torch.equal(compiled(x), layer.encode(x))
    _write(layer)
    assert torch.equal(compiled(x), layer.encode(x))


def test_drop_ins_are_frozen_too():
    from vqkernels.compat.taming import VectorQuantizer2
    from vqkernels.compat.vector_quantize_pytorch import VectorQuantize

    maps, rows = _randn(2, 6, 3, 4, seed=10), _randn(2, 7, 6, seed=11)
    for layer, x in (
        (VectorQuantizer2(40, 6, 0.25), maps),
        (VectorQuantize(6, 40), rows),
        (VectorQuantize(6, 40, use_cosine_sim=True), rows),
    ):
        expected = layer.eval()(x)
        with vq.frozen_codebook(layer):
            frozen = [each for each in layer.modules() if isinstance(each, Freezable) and each._frozen is not None]
            assert len(frozen) == 1
            assert torch.equal(layer(x)[0], expected[0])
            layer.train()
            with pytest.raises(RuntimeError, match="expected no training forward inside frozen_codebook"):
                layer(x)
            layer.eval()

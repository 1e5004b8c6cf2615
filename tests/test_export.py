"""Exported graphs: the same codes and images at any size, with vqkernels' ops or with standard ones alone."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizers import OPTIONS, make, randn, state
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from vqkernels.models import VQGAN, VQVAE

import vqkernels as vq
from vqkernels.export import decoder_program, encoder_program, save
from vqkernels.ops import plain

TINY = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while it saves and converts


def trained(**options) -> vq.VectorQuantizer:
    module = make(**options)
    for seed in range(2):
        module(randn(*shape_of(options, 4, 10), seed=seed))
    return module.eval()


def shape_of(options: dict, batch: int, length: int) -> tuple[int, ...]:
    return (batch, 8, length, 3) if options.get("channels") == "first" else (batch, length, 8)


def own_ops(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "vqkernels" in str(node.target)]


def reloaded(program: ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


# ---- torch.export ----


CASES = {
    "plain": {},
    "maps": {"channels": "first"},
    "cosine": {"metric": "cosine"},
    "all": {"channels": "first", "metric": "cosine", "codebook_dim": 5, "update": "gradient"},
}


@pytest.mark.parametrize("standard", [False, True], ids=["own", "plain"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_encoder_and_decoder_of_a_quantizer_at_any_size(options: dict, standard: bool):
    module = trained(**options)
    example = randn(*shape_of(options, 1, 6))
    encoder = encoder_program(module, example, plain=standard)
    decoder = decoder_program(module, module.encode(example), plain=standard)
    assert own_ops(encoder) == ([] if standard else ["vqkernels.nearest.default"])
    assert not own_ops(decoder)
    encode, decode = encoder.module(), decoder.module()
    for batch, length in ((1, 6), (3, 1), (5, 9)):
        x = randn(*shape_of(options, batch, length), seed=batch)
        codes = encode(x)
        assert torch.equal(codes, module(x).codes)
        assert torch.equal(decode(codes), module.lookup(codes))


def test_a_program_survives_saving_and_holds_what_it_reads_alone():
    module = trained(metric="cosine", codebook_dim=5)
    x = randn(2, 6, 8)
    encoder, decoder = encoder_program(module, x), decoder_program(module, module.encode(x))
    assert set(encoder.state_dict) == {f"model.{n}" for n in ("codebook", "project_in.weight", "project_in.bias")}
    assert set(decoder.state_dict) == {f"model.{n}" for n in ("codebook", "project_out.weight", "project_out.bias")}
    encode, decode = reloaded(encoder), reloaded(decoder)
    for size in (1, 3):
        x = randn(size, 4, 8)
        assert torch.equal(encode(x), module.encode(x))
        assert torch.equal(decode(encode(x)), module.lookup(module.encode(x)))


@pytest.mark.parametrize("name", ["plain", "gradient-cosine", "projected"])
def test_a_whole_quantizer_in_eval_with_a_dynamic_batch(name: str):
    module = trained(**OPTIONS[name])
    before = state(module)
    program = torch.export.export(module, (randn(2, 9, 8),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    assert not program.graph_signature.buffers_to_mutate
    x = randn(5, 4, 8)
    for got, expected in zip(vars(reloaded(program)(x)).values(), vars(module(x)).values(), strict=True):
        torch.testing.assert_close(got, expected)
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())


@pytest.fixture(scope="module")
def model() -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE({**TINY, "quantizer": {"codebook_size": 16, "dead_code_threshold": 0.0}})
    model(randn(2, 3, 16, 16))
    return model.eval()


def vqgan() -> VQGAN:
    torch.manual_seed(0)
    shape = {"latent_channels": 8, "norm_groups": 4, "resolution": 16, "attention_resolutions": [8], "channels": 8}
    quantizer = {"codebook_size": 16, "dead_code_threshold": 0.0}
    return VQGAN({**shape, "channel_multipliers": [1, 2], "blocks": 1, "quantizer": quantizer}).eval()


@pytest.mark.parametrize(("kind", "standard"), [("vqvae", False), ("vqvae", True), ("vqgan", True)])
def test_encoder_and_decoder_of_a_model_at_any_size(model: VQVAE, kind: str, standard: bool):
    model = vqgan() if kind == "vqgan" else model
    images = randn(1, 3, 4 * model.factor, 4 * model.factor)
    encoder = encoder_program(model, images, plain=standard)
    decoder = decoder_program(model, model.encode(images), plain=standard)
    assert own_ops(encoder) == ([] if standard else ["vqkernels.nearest.default"])
    assert not any("decoder" in name for name in encoder.state_dict)
    encode, decode = reloaded(encoder), reloaded(decoder)
    for batch, height, width in ((1, 2, 3), (4, 5, 2)):
        images = randn(batch, 3, height * model.factor, width * model.factor)
        codes = encode(images)
        assert torch.equal(codes, model.encode(images))
        torch.testing.assert_close(decode(codes), model.decode(codes))
    with pytest.raises((IndexError, RuntimeError)):
        decode(torch.full((2, 3, 3), 16))


def test_mistakes_are_named(model: VQVAE, tmp_path: Path):
    with pytest.raises(ValueError, match="model: expected in eval mode"):
        encoder_program(make(), randn(2, 3, 8))
    with pytest.raises(TypeError, match="model: expected a module with encode, got Linear"):
        encoder_program(nn.Linear(3, 3).eval(), randn(2, 3))
    program = encoder_program(make().eval(), randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"path: expected to end in one of .*, got 'x.bin'"):
        save(program, "x.bin")
    with pytest.raises(ValueError, match=r"expected standard ops alone .*, got vqkernels.nearest"):
        save(program, tmp_path / "x.onnx")


# ---- standard ops ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("chunk", [plain.CHUNK, 100])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_plain_ops_find_the_same_codes(monkeypatch: pytest.MonkeyPatch, metric: str, chunk: int, offset: float):
    """Also where float32's expansion gets most of them wrong, and by blocks of codes."""
    monkeypatch.setattr(plain, "CHUNK", chunk)
    for n, k, dim in ((500, 1000, 16), (70, 3, 5), (1, 1, 1)):
        x, codebook = randn(n, dim) + offset, randn(k, dim, seed=1) + offset
        codebook[k // 2 : k // 2 * 2] = codebook[: k // 2] * (1 + 2.0**-20)  # pairs of codes that float32 mistakes
        codes, distance = vq.nearest(x, codebook, metric=metric)
        with vq.plain_ops():
            found, measured = vq.nearest(x, codebook, metric=metric)
        assert torch.equal(found, codes)
        torch.testing.assert_close(measured, distance, rtol=1e-6, atol=2.0**-50)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_plain_ops_at_any_scale_and_with_ties(metric: str, scale: float):
    x, codebook = randn(200, 6) * scale, randn(40, 6, seed=1) * scale
    codebook[20:23] = codebook[3]  # four equal codes: the lowest index
    codebook[30] = 0
    x[5] = 0
    with vq.plain_ops():
        found, _ = vq.nearest(x, codebook, metric=metric)
    keep = torch.arange(200) != 5  # every cosine of a zero token ties with all others
    assert torch.equal(found[keep], vq.nearest(x, codebook, metric=metric)[0][keep])


def test_plain_ops_know_masks_bad_tokens_and_half_precision():
    x, codebook = randn(3, 20, 8), randn(32, 8, seed=1)
    x[0, 3, 1], x[1, 2, 0] = float("nan"), float("inf")
    mask = randn(3, 20, seed=2) > 0
    for tokens in (x, x.bfloat16(), x.double()):
        book = codebook.to(tokens.dtype)
        expected = vq.quantize(tokens, book, mask=mask)
        with vq.plain_ops():
            found = vq.quantize(tokens, book, mask=mask)
        for name, a, b in zip(expected._fields, found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, equal_nan=True, msg=name)
    codes = vq.nearest(x, codebook)[0]
    expected = vq.codebook_stats(x, codes, 32)
    with vq.plain_ops():
        torch.testing.assert_close(vq.codebook_stats(x, codes, 32), expected)


@pytest.mark.parametrize("name", ["plain", "gradient-cosine", "projected"])
def test_a_quantizer_in_eval_is_the_same_under_plain_ops(name: str):
    module, x = trained(**OPTIONS[name]), randn(3, 20, 8)
    mask = randn(3, 20, seed=2) > 0
    expected = module(x, mask)
    with vq.plain_ops():
        found = module(x, mask)
        program = torch.export.export(module, (x, mask))
    assert not own_ops(program)
    for got, want in zip(vars(found).values(), vars(expected).values(), strict=True):
        torch.testing.assert_close(got, want)
    assert not plain.active()


def test_a_plain_program_needs_no_vqkernels(model: VQVAE, tmp_path: Path):
    images = randn(2, 3, 16, 16)
    save(encoder_program(model, images, plain=True), tmp_path / "encoder.pt2")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        f"encode = torch.export.load(r'{tmp_path / 'encoder.pt2'}').module()\n"
        f"codes = encode(torch.load(r'{tmp_path / 'images.pt'}'))\n"
        f"torch.save(codes, r'{tmp_path / 'codes.pt'}')\n"
        "assert 'vqkernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "codes.pt"), model.encode(images))


# ---- ONNX ----


def run_onnx(path: Path, value: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def test_onnx_runtime_gives_the_quantizers_codes(tmp_path: Path):
    module = trained(metric="cosine")
    save(encoder_program(module, randn(2, 6, 8), plain=True), tmp_path / "encoder.onnx")
    for batch, length in ((1, 1), (4, 50)):
        x = randn(batch, length, 8)
        x[0, 0, 0] = float("nan") if batch > 1 else 0.0
        assert torch.equal(run_onnx(tmp_path / "encoder.onnx", x), module.encode(x))


def test_onnx_runtime_gives_the_models_codes_and_images(model: VQVAE, tmp_path: Path):
    images = randn(2, 3, 16, 16)
    save(encoder_program(model, images, plain=True), tmp_path / "encoder.onnx")
    save(decoder_program(model, model.encode(images)), tmp_path / "decoder.onnx")
    images = randn(3, 3, 6 * model.factor, 5 * model.factor)
    codes = run_onnx(tmp_path / "encoder.onnx", images)
    # its convolutions add in another order: a code may differ where two are equally near up to float32's rounding
    expected = model.encode(images)
    latents = model.encoder(images).movedim(1, -1)
    rows = model.quantizer.codebook
    slack = ((latents - rows[codes]).square().sum(-1) - (latents - rows[expected]).square().sum(-1)).max()
    assert slack <= 1e-4 * latents.square().sum(-1).max()
    torch.testing.assert_close(run_onnx(tmp_path / "decoder.onnx", codes), model.decode(codes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["dot", "euclidean", "cosine"])
def test_index_propagation_in_standard_ops(metric: str):
    module = vq.IndexPropagationQuantizer(8, 32, metric=metric).eval()
    x = randn(3, 9, 8)
    program = encoder_program(module, x, plain=True)
    assert torch.equal(program.module()(x), module.encode(x))
    graphs = [each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    assert not [node for graph in graphs for node in graph.nodes if "vqkernels" in str(node.target)]


LOOKUP_FREE = {
    "lfq": (vq.LookupFreeQuantizer(6), (2, 6, 6)),
    "projected": (vq.LookupFreeQuantizer(8, codebook_dim=5), (2, 6, 8)),
    "bsq": (vq.LookupFreeQuantizer(36, spherical=True, group_size=9, channels="first"), (2, 36, 6, 3)),
}


@pytest.mark.parametrize(("module", "shape"), LOOKUP_FREE.values(), ids=LOOKUP_FREE)
def test_signs_need_no_op_of_ours(module: vq.LookupFreeQuantizer, shape: tuple[int, ...]):
    encoder = encoder_program(module.eval(), randn(*shape))
    assert not own_ops(encoder)
    x = randn(3, shape[1], 7, *shape[3:]) if len(shape) == 4 else randn(3, 7, shape[2])
    assert torch.equal(encoder.module()(x), module(x).codes)


@pytest.mark.parametrize(
    "module",
    [vq.LookupFreeQuantizer(8, codebook_dim=5), vq.IndexPropagationQuantizer(8, 32)],
    ids=["lookup-free", "index-propagation"],
)
def test_onnx_runtime_gives_the_codes_of_the_other_quantizers(module: nn.Module, tmp_path: Path):
    save(encoder_program(module.eval(), randn(2, 6, 8), plain=True), tmp_path / "encoder.onnx")
    for batch, length in ((1, 1), (4, 50)):
        x = randn(batch, length, 8)
        x[0, 0, 0] = float("nan") if batch > 1 else 0.5
        assert torch.equal(run_onnx(tmp_path / "encoder.onnx", x), module.encode(x))


def test_index_propagation_alone_may_have_its_channels_first():
    module = vq.IndexPropagationQuantizer(8, 32, channels="first").eval()
    x = randn(3, 8, 7, 5)
    assert torch.equal(encoder_program(module, randn(2, 8, 6, 3)).module()(x), module(x).codes)

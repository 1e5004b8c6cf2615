"""Every quantizer that a model's config can name: the model's behaviour, its log, its files and its commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vqkernels.models import (
    VQGAN,
    VQVAE,
    CodesWriter,
    EntropyConfig,
    LookupFreeConfig,
    QuantizerConfig,
    TrainConfig,
    VectorQuantizerConfig,
    VQGANConfig,
    VQVAEConfig,
    evaluate,
    load_config,
    load_pretrained,
    open_codes,
    save_config,
    save_diffusers,
    train,
)
from vqkernels.models.checkpoint import load_newest, save_checkpoint
from vqkernels.models.metrics import CodeCounter, code_counts, code_usage
from vqkernels.models.quantizer import code_table

from vqkernels import entropy_loss, sign_entropy_loss
from vqkernels.cli.main import main
from vqkernels.export import decoder_program, encoder_program

ENTROPY = EntropyConfig(weight=0.3, temperature=0.5, token_weight=0.7, batch_weight=0.9, eps=1e-5)
IBQ = {"update": "gradient", "gradient": "index_propagation", "metric": "dot", "kmeans_init": False}
FORMS = {
    "lfq": LookupFreeConfig(codebook_dim=8),
    "lfq-projected": LookupFreeConfig(codebook_dim=5, entropy=ENTROPY, code_scale=0.5),
    "bsq": LookupFreeConfig(codebook_dim=12, spherical=True, group_size=4, commitment_weight=0.1),
    "vq-entropy": QuantizerConfig(32, kmeans_init=False, entropy=ENTROPY),
    "vq-sampling": QuantizerConfig(32, kmeans_init=False, update="gradient", sampling_temperature=0.5),
    "ibq-entropy": QuantizerConfig(32, codebook_dim=4, entropy=ENTROPY, **IBQ),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_model = pytest.mark.parametrize("kind", ["vqvae", "vqgan"])


def make_model(form: str, kind: str = "vqvae") -> VQVAE | VQGAN:
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 1, 2], "blocks": 1, "latent_channels": 8}
    if kind == "vqvae":
        return VQVAE(VQVAEConfig(quantizer=FORMS[form], **shape))
    return VQGAN(VQGANConfig(quantizer=FORMS[form], resolution=16, attention_resolutions=[4], norm_groups=4, **shape))


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@every_model
@every_form
def test_decode_of_encode_is_the_forward_pass_and_trains_nothing(form, kind):
    model, images = make_model(form, kind).eval(), images_of(2, 3, 16, 24)
    with torch.no_grad():
        out = model(images)
    model.train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    codes = model.encode(images)
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert torch.equal(codes, out.quantizer.codes)
    assert codes.shape == (2, 4, 6)
    assert codes.unique().numel() > 1
    assert codes.max() < model.config.quantizer.codebook_size
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1))
    with pytest.raises(ValueError, match=rf"codes must lie in \[0, {model.config.quantizer.codebook_size - 1}\]"):
        model.decode(codes + model.config.quantizer.codebook_size)


@every_model
@every_form
def test_every_weight_learns(form, kind):
    model, images = make_model(form, kind), images_of(2, 3, 32, 32)
    with torch.no_grad():  # a VQVAE's blocks start as the identity; a step's worth of noise opens them
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    out = model(images)
    ((out.reconstruction - images).square().mean() + out.loss).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # adding to every key changes no softmax: that gradient is zero but for rounding
        assert name.endswith("k.bias") or weight.grad.abs().max() > 0, name


@every_form
def test_the_options_arrive(form):
    model, config = make_model(form), FORMS[form]
    module = model.quantizer
    assert module.codebook_size == config.codebook_size
    assert module.commitment_weight == config.commitment_weight
    if config.entropy.weight:
        assert dataclasses.asdict(module.entropy) == dataclasses.asdict(config.entropy)
    if isinstance(config, LookupFreeConfig):
        scale = config.codebook_dim**-0.5 if config.spherical else config.code_scale
        assert module.code_scale == pytest.approx(scale)
        assert (module.spherical, module.group_size) == (config.spherical, config.group_size or config.codebook_dim)
    if form == "vq-sampling":
        assert module.sampling.temperature == 0.5
        assert module.entropy is None


@pytest.mark.parametrize("form", ["lfq-projected", "vq-entropy", "ibq-entropy"])
def test_the_loss_has_the_entropy_term_that_the_config_asks_for(form):
    model, images = make_model(form), images_of(2, 3, 16, 16)
    module, tokens = model.quantizer, model.tokens(images).detach().movedim(1, -1)
    tokens = module.project_in(tokens).detach()
    options = {"temperature": 0.5, "token_weight": 0.7, "batch_weight": 0.9, "eps": 1e-5}
    if form == "lfq-projected":
        expected = sign_entropy_loss(tokens, code_scale=0.5, **options)
    else:
        metric = "dot" if form == "ibq-entropy" else "euclidean"
        expected = entropy_loss(tokens, module.codebook.detach(), metric=metric, **options)
    with torch.no_grad():
        without = model.eval()(images).loss
    out = model.train()(images)
    figures = dict(zip(model.figure_names, model.figures(out), strict=True))
    torch.testing.assert_close(figures["entropy_loss"].detach(), expected.loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures["token_entropy"].detach(), expected.token_entropy.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss - without, 0.3 * expected.loss, rtol=1e-3, atol=1e-5)


def test_sampling_draws_in_training_alone():
    model, images = make_model("vq-sampling"), images_of(2, 3, 32, 32)
    nearest = model.encode(images)
    assert not torch.equal(model(images).quantizer.codes, nearest)
    assert torch.equal(model.eval()(images).quantizer.codes, nearest)
    assert model.figure_names == ("commitment_loss", "perplexity", "usage")


@every_form
def test_save_and_load(form, tmp_path):
    model = make_model(form).eval()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    images = images_of(1, 3, 16, 16)
    assert torch.equal(loaded.encode(images), model.encode(images))
    as_dicts = VQVAEConfig(**json.loads((tmp_path / "config.json").read_text()))  # as huggingface_hub restores them
    assert as_dicts == model.config
    save_config(TrainConfig(model=model.config), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").model == model.config


def test_a_model_saved_before_there_were_kinds_loads(tmp_path):
    model = VQVAE(VQVAEConfig(channels=8, channel_multipliers=[1], quantizer=QuantizerConfig(16))).eval()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["kind"]
    for name in ("kind", "entropy", "sampling_temperature"):
        del values["quantizer"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()


def known_weights(model: VQVAE | VQGAN) -> VQVAE | VQGAN:
    codebooks = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("codebook")]
    with torch.no_grad():
        for place, (_, tensor) in enumerate([*model.named_parameters(), *codebooks]):
            tensor.copy_((torch.arange(tensor.numel()).remainder(97) - 48 + place).view(tensor.shape) / 64)
    return model


def test_fingerprints_are_those_of_the_first_saved_models():
    """Computed before quantizers had kinds, entropy losses and sampling."""
    one, two = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 4}, FORMS["ibq-entropy"]
    vqvae = VQVAE(VQVAEConfig(patch_size=2, quantizer=QuantizerConfig(codebook_size=16, metric="cosine"), **one))
    assert known_weights(vqvae).fingerprint() == "4d5388da21333b125ace9c39ebd9606f"
    quantizer = QuantizerConfig(16, codebook_dim=3, update="gradient", gradient="index_propagation", metric="dot")
    size = {"resolution": 16, "attention_resolutions": [8], "norm_groups": 4}
    vqgan = VQGAN(VQGANConfig(quantizer=quantizer, **one, **size))
    assert known_weights(vqgan).fingerprint() == "eae0cc97d8e674d3ecc65b50a0f64d07"
    quantizer = dataclasses.replace(quantizer, entropy=two.entropy)
    other = VQGAN(dataclasses.replace(vqgan.config, quantizer=quantizer))
    assert known_weights(other).fingerprint() != vqgan.fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lfg"}, r"option 'quantizer.kind' must be one of vq, lfq, got 'lfg'"),
        ({"kind": "lfq", "metric": "dot"}, r"unknown option 'quantizer.metric'"),
        ({"kind": "lfq", "codebook_dim": 63}, r"codebook_dim must lie in \[1, 62\], got 63"),
        ({"kind": "lfq", "codebook_dim": 36}, r"group_size must be a divisor .* at most 24 .*, got None for 36 bits"),
        ({"kind": "lfq", "codebook_dim": 9, "group_size": 2}, r"group_size must be a divisor .*, got 2 for 9 bits"),
        ({"kind": "lfq", "code_scale": 0}, r"code_scale must be greater than 0, got 0"),
        ({"kind": "lfq", "commitment_weight": -1}, r"commitment_weight must be 0 or greater, got -1"),
        ({"kind": "lfq", "entropy": {"weight": -1}}, r"^quantizer\.entropy\.weight must be 0 or greater, got -1"),
        ({"entropy": {"temperature": 0}}, r"^quantizer\.entropy\.temperature must be greater than 0, got 0"),
        ({"entropy": {"weigth": 1}}, r"unknown option 'quantizer.entropy.weigth'; did you mean .*weight'"),
        ({"sampling_temperature": -1}, r"sampling_temperature must be 0 or greater, got -1"),
        ({"sampling_temperature": 1, **IBQ}, r"sampling_temperature must be 0 with gradient: index_propagation, got 1"),
    ],
)
def test_a_wrong_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(quantizer=options)


def test_the_kind_chooses_the_class():
    assert isinstance(VQVAEConfig(quantizer={"codebook_size": 8}).quantizer, VectorQuantizerConfig)
    assert isinstance(VQVAEConfig(quantizer={"kind": "vq"}).quantizer, VectorQuantizerConfig)
    assert VQVAEConfig(quantizer={"kind": "lfq", "codebook_dim": 10}).quantizer.codebook_size == 1024
    assert VQVAEConfig(quantizer={"entropy": {"eps": 1e-5}}).quantizer.entropy.weight == 0.1
    assert VectorQuantizerConfig().entropy.weight == 0


# ---- what reads a codebook, without one


def test_evaluation_and_pictures_take_a_quantizer_without_a_codebook():
    model = make_model("bsq").eval()
    found = evaluate(model, images_of(3, 3, 32, 48))
    assert found.codebook_size == 4096
    (level,) = found.levels
    assert found.usage.used == len(level.table) == found.codes.unique().numel()
    assert found.bits_per_pixel.fixed == pytest.approx(12 / 16)
    vectors = level.table[level.places]  # [B, h, w, D]
    torch.testing.assert_close(vectors.movedim(-1, 1), model.quantizer.lookup(found.codes).detach())
    assert found.picture().mode == "RGB"
    with_codebook = make_model("vq-entropy").eval()
    codes, table = code_table(with_codebook.quantizer, torch.zeros(1, 2, 2, dtype=torch.long))
    assert torch.equal(table, with_codebook.quantizer.codebook)
    assert torch.equal(codes, torch.zeros(1, 2, 2, dtype=torch.long))


def test_usage_of_codebooks_too_large_to_list():
    few = torch.tensor([[[0, 2**61, 5], [5, 5, 2**61]]])
    usage = code_usage(few, 2**62)
    assert usage.used == 3
    assert usage.usage == 3 / 2**62
    assert code_counts(few, 2**62).tolist() == [1, 3, 2]
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 7\]"):
        code_usage(few, 8)


@pytest.mark.parametrize("size", [64, 2**36])
def test_counts_are_added_up_over_pieces(monkeypatch, size):
    codes = np.random.default_rng(0).integers(0, 40, 1000)
    whole = code_counts(codes, size)
    monkeypatch.setattr("vqkernels.models.metrics.CHUNK", 64)
    assert code_counts(codes, size).tolist() == whole.tolist() == np.unique(codes, return_counts=True)[1].tolist()


def test_a_counter_adds_up_and_refuses_what_is_out_of_range():
    counter = CodeCounter(2**36)
    for part in ([[7, 7], [2**35, 0]], [[0, 0], [7, 3]]):
        counter.update(torch.tensor(part))
    assert (counter.codes.tolist(), counter.counts.tolist()) == ([0, 3, 7, 2**35], [3, 1, 3, 1])
    for code in (-1, 2**36):
        with pytest.raises(ValueError, match=rf"codes must lie in \[0, {2**36 - 1}\], got"):
            counter.update(torch.tensor([[code]]))


def test_code_files_of_36_bits(tmp_path):
    config = LookupFreeConfig(codebook_dim=36, spherical=True, group_size=9)
    torch.manual_seed(0)
    shape = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "latent_channels": 8}
    model = VQVAE(VQVAEConfig(quantizer=config, **shape)).eval()
    codes = model.encode(images_of(2, 3, 16, 16))
    assert codes.max() >= 2**32
    with CodesWriter(tmp_path, model) as writer:
        writer.append(codes, ["a.png", "b.png"])
    opened = open_codes(tmp_path, model)
    assert opened.meta.dtype == "int64"
    assert np.array_equal(opened.codes, codes.numpy())


def test_export_gives_the_same_codes_and_images():
    torch.manual_seed(0)
    shape = {"patch_size": 2, "channels": 8, "channel_multipliers": [1], "blocks": 1, "group_norm": False}
    model = VQVAE(VQVAEConfig(quantizer=FORMS["lfq-projected"], latent_channels=6, **shape)).eval()
    images = images_of(2, 3, 8, 12)
    codes = model.encode(images)
    assert torch.equal(encoder_program(model, images, plain=True).module()(images), codes)
    decoded = decoder_program(model, codes).module()(codes)
    torch.testing.assert_close(decoded, model.decode(codes), atol=1e-5, rtol=1e-5)


def test_diffusers_has_no_lookup_free_quantizer(tmp_path):
    with pytest.raises(ValueError, match=r"quantizer.kind: diffusers' VQModel has vq alone, got lfq"):
        save_diffusers(make_model("lfq", "vqgan"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- training and the commands


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    down, across = np.mgrid[0:32, 0:32] / 32
    for number in range(3):
        waves = [np.sin(6 * (number + 1) * down + channel + 5 * across) for channel in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def run_config(pictures: Path, output: Path, **changes) -> TrainConfig:
    options = {"image_size": 16, "batch_size": 2, "steps": 2, "threads": 1, "device": "cpu", "log_every": 1}
    model = make_model("lfq-projected").config
    return TrainConfig(data=str(pictures), output=str(output), model=model, **{**options, **changes})


@pytest.fixture(scope="module")
def lfq_run(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "lfq"
    train(run_config(pictures, output, validation=str(pictures)))
    return output


def test_the_training_log_has_the_entropies(lfq_run):
    lines = [json.loads(line) for line in (lfq_run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 2
    for line in logged:
        difference = ENTROPY.token_weight * line["token_entropy"] - ENTROPY.batch_weight * line["batch_entropy"]
        assert line["entropy_loss"] == pytest.approx(difference, rel=1e-4)
        bottleneck = 0.25 * line["commitment_loss"] + ENTROPY.weight * line["entropy_loss"]
        assert line["loss"] == pytest.approx(line["l1"] + line["mse"] + bottleneck, rel=1e-4)
    assert any("held_out_perplexity" in line for line in lines)
    assert list((lfq_run / "samples").glob("*.png"))


def test_the_commands_take_it(lfq_run, pictures, tmp_path, capsys):
    assert main(["reconstruct", str(lfq_run), str(pictures / "0.png"), "-o", str(tmp_path / "seen")]) == 0
    assert (tmp_path / "seen" / "0-comparison.png").is_file()
    assert main(["encode", str(lfq_run), str(pictures), "-o", str(tmp_path / "codes")]) == 0
    assert "of 32" in capsys.readouterr().out
    assert main(["decode", str(lfq_run), str(tmp_path / "codes"), "-o", str(tmp_path / "decoded")]) == 0
    with Image.open(tmp_path / "decoded" / "1.png") as picture:
        assert picture.size == (32, 32)


def test_what_looks_at_a_search_says_that_there_is_none(lfq_run, pictures, tmp_path, capsys):
    assert main(["audit", str(lfq_run), "--images", str(pictures)]) == 2
    assert "expected a model that searches a codebook, got one with an lfq quantizer" in capsys.readouterr().err
    assert main(["profile", "-c", str(lfq_run / "config.yaml"), "-o", str(tmp_path), "--device", "cpu"]) == 2
    assert "expected a model with one quantizer that searches a codebook" in capsys.readouterr().err


def test_a_run_from_before_there_were_kinds_goes_on(pictures, tmp_path):
    model = VQVAEConfig(channels=8, channel_multipliers=[1], blocks=1, quantizer=QuantizerConfig(8))
    config = dataclasses.replace(run_config(pictures, tmp_path), model=model)
    train(config)
    state = load_newest(tmp_path / "checkpoints")
    for name in ("kind", "entropy", "sampling_temperature"):
        del state["model_config"]["quantizer"][name]
    save_checkpoint(tmp_path / "checkpoints", state["step"], state, 3)
    assert train(dataclasses.replace(config, steps=3, resume=True)).steps == 3
    other = dataclasses.replace(model, quantizer=dataclasses.replace(model.quantizer, entropy=ENTROPY))
    with pytest.raises(ValueError, match=r"model.quantizer.entropy.weight is 0.3 now and was 0.0.* in the checkpoint"):
        train(dataclasses.replace(config, model=other, steps=4, resume=True))

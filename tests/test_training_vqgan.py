"""Training a VQGAN by config: phases, another model's weights as the start, determinism, curves, kills, two ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_and_resume import kill_and_resume, make_config, write_pictures
from PIL import Image
from two_ranks import train_with_torchrun, train_with_two_ranks
from vqkernels.models import (
    VQGAN,
    HierarchicalVQVAEConfig,
    KLVAEConfig,
    QuantizerConfig,
    TrainConfig,
    VQGANConfig,
    VQVAEConfig,
    load_config,
    make_model,
    train,
)
from vqkernels.models.checkpoint import load_newest, save_checkpoint
from vqkernels.models.config import DiscriminatorConfig
from vqkernels.models.curves import PANELS, draw_curves
from vqkernels.models.objective import ADVERSARIAL_PARTS, PARTS
from vqkernels.models.run_log import read_metrics


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def run_of(pictures: Path, output: Path, **changes) -> TrainConfig:
    options = {
        "steps": 6,
        "num_workers": 0,
        "log_every": 1,
        "checkpoint_every": 100,
        "perceptual_weight": 0.0,
        **changes,
    }
    return dataclasses.replace(make_config(pictures, output, 6), **options)


@pytest.mark.curves
def test_the_losses_begin_at_their_share_of_the_run(pictures, tmp_path):
    critic = DiscriminatorConfig(kind="patch", channels=8, layers=1, start_share=0.5)
    changes = {"perceptual_weight": 0.1, "perceptual_start": 0.3, "discriminator": critic, "sample_every": 3}
    result = train(run_of(pictures, tmp_path / "run", **changes))
    assert isinstance(result.model, VQGAN)
    lines = [line for line in result.history if "loss" in line]
    assert [line["perceptual"] > 0 for line in lines] == [False, False, True, True, True, True]
    assert [line["adaptive_weight"] > 0 for line in lines] == [False, False, False, True, True, True]
    assert all(line["peak_memory_mib"] > 10 for line in lines)
    assert {"usage", "perplexity", "commitment_loss"} <= lines[0].keys()
    picture = Image.open(tmp_path / "run" / "curves.png")
    assert picture.width > 600
    assert len(np.unique(np.asarray(picture).reshape(-1, 3 if picture.mode == "RGB" else 4), axis=0)) > 50


def test_no_line_of_the_log_mixes_steps_with_a_loss_and_without(pictures, tmp_path):
    """One ends where a loss begins, and holds the means of its own steps; in a run that goes on from there, too."""
    critic = DiscriminatorConfig(kind="patch", channels=8, layers=1, start_share=0.5)
    changes = {"perceptual_weight": 0.1, "perceptual_start": 0.3, "discriminator": critic}

    def lines(log_every: int, **options) -> list[dict]:
        config = run_of(pictures, tmp_path / str(log_every), log_every=log_every, **changes, **options)
        return [line for line in train(config).history if "loss" in line]

    steps, sparse = lines(1), lines(4, checkpoint_every=2, keep_checkpoints=9)
    assert [line["step"] for line in sparse] == [2, 3, 4, 6]
    for line, before in zip(sparse, [0, 2, 3, 4], strict=True):
        own = steps[before : line["step"]]
        for name in ("loss", "l1", "perceptual", "discriminator_loss", "grad_norm"):
            assert line[name] == pytest.approx(sum(each[name] for each in own) / len(own), rel=1e-5), (name, line)
    for file in (tmp_path / "4" / "checkpoints").glob("step-*.pt"):
        if file.name > "step-00000002.pt":
            file.unlink()
    resumed = lines(4, resume=True)
    assert [(line["step"], line["loss"]) for line in resumed] == [(line["step"], line["loss"]) for line in sparse]


def test_curves_show_only_what_was_logged(tmp_path):
    history = [{"step": 10 * step, "psnr": 10.0 + step, "l1": 1 / step, "adaptive_weight": 0.0} for step in range(1, 9)]
    draw_curves(history, tmp_path / "some.png")
    draw_curves([*history, {"step": 90, "adaptive_weight": 0.1, "discriminator_loss": 1.0}], tmp_path / "more.png")
    draw_curves([], tmp_path / "none.png")
    widths = {name: Image.open(tmp_path / f"{name}.png").height for name in ("some", "more", "none")}
    assert widths["more"] > widths["some"]  # a second row of panels
    assert np.asarray(Image.open(tmp_path / "none.png").convert("RGB")).min() == 255


def test_every_panel_shows_what_some_model_logs():
    logged = {*PARTS, *ADVERSARIAL_PARTS, "psnr", "grad_norm", "images_per_second"}
    quantizer = {"codebook_size": 4, "entropy": {"weight": 0.1}}
    shape = {"channels": 8, "channel_multipliers": [1, 1], "latent_channels": 4, "blocks": 1}
    for config in (
        VQVAEConfig(**shape, quantizer=quantizer),
        HierarchicalVQVAEConfig(**shape, top_quantizer=quantizer, bottom_quantizer=quantizer),
        KLVAEConfig(**shape, resolution=16, attention_resolutions=[], norm_groups=4),
    ):
        model = make_model(config)
        logged |= {*model.figure_names, *model.health()}
    for panel in PANELS:
        for name in panel.names:
            assert any(each == name or each.endswith((f"_{name}", f".{name}")) for each in logged), name


def test_a_hierarchy_has_its_codes_in_the_curves(tmp_path):
    plain = [{"step": step, "psnr": 20.0 + step} for step in (1, 2)]
    names = ("top_usage", "bottom_usage", "held_out_top_perplexity", "top_quantizer.code_length", "top_commitment_loss")
    draw_curves(plain, tmp_path / "plain.png")
    draw_curves([{**line, **dict.fromkeys(names, 0.5)} for line in plain], tmp_path / "levels.png")
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("plain", "levels")]
    assert heights[1] > heights[0]  # five panels in the place of one


def test_codes_that_a_run_starts_from_are_not_replaced_by_k_means(pictures, tmp_path):
    quantizer = QuantizerConfig(codebook_size=64, kmeans_init=False, update="gradient", dead_code_threshold=0.0)
    model = dataclasses.replace(make_config(pictures, tmp_path, 1).model, quantizer=quantizer)
    first = train(run_of(pictures, tmp_path / "first", steps=1, model=model)).model
    model = dataclasses.replace(model, quantizer=dataclasses.replace(quantizer, kmeans_init=True))
    changes = {"steps": 1, "model": model, "start_from": str(tmp_path / "first"), "learning_rate": 1e-9}
    second = train(run_of(pictures, tmp_path / "second", **changes)).model
    torch.testing.assert_close(second.quantizer.codebook, first.quantizer.codebook, rtol=0, atol=1e-5)


def test_a_resumed_run_sees_the_same_crops_or_says_so(pictures, tmp_path):
    config = run_of(pictures, tmp_path / "run", steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"color_jitter is 0.5 now and was 0.0"):
        train(dataclasses.replace(config, steps=2, resume=True, color_jitter=0.5))
    state = load_newest(tmp_path / "run" / "checkpoints")
    state["order"].pop("color_jitter")  # as written before there was such an option
    state["window"] = state["window"][:3]
    state.pop("window_names")
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, state, 1)
    assert train(dataclasses.replace(config, steps=2, resume=True)).steps == 2


def test_a_run_starts_from_the_weights_of_another_model(pictures, tmp_path):
    first = train(run_of(pictures, tmp_path / "first", steps=2))
    changed = run_of(pictures, tmp_path / "second", steps=1, start_from=str(tmp_path / "first"), learning_rate=1e-12)
    changed.model = dataclasses.replace(changed.model, dropout=0.0)  # shapes no weight
    second = train(changed).model.state_dict()
    for name, value in first.model.named_parameters():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)
    other = dataclasses.replace(changed.model, quantizer=QuantizerConfig(codebook_size=32))
    config = run_of(pictures, tmp_path / "third", start_from=str(tmp_path / "first"), model=other)
    with pytest.raises(ValueError, match=r"model\.quantizer\.codebook_size is 32 now and was 64"):
        train(config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(dataclasses.replace(config, start_from=str(tmp_path / "nowhere")))


def test_deterministic_holds_for_the_run_alone(pictures, tmp_path):
    seen = []
    config = run_of(pictures, tmp_path / "run", steps=1)
    train(config, progress=lambda report: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_killed_at_random_moments_it_ends_like_an_undisturbed_run(tmp_path):
    """Two kills in 24 steps; `python tests/kill_and_resume.py` makes five in 200."""
    killed, differences = kill_and_resume(tmp_path, steps=24, kills=2, seed=1)
    assert len(killed) == 2
    assert differences == []


def gan_run(pictures: Path, output: Path, batch_size: int, steps: int) -> TrainConfig:
    """Without what is drawn per rank (dropout, augmentation, revival, k-means)."""
    quantizer = QuantizerConfig(codebook_size=64, dead_code_threshold=0.0, kmeans_init=False)
    model = dataclasses.replace(make_config(pictures, output, steps).model, dropout=0.0, quantizer=quantizer)
    critic = DiscriminatorConfig(kind="patch", channels=8, layers=1, norm="act", start_step=2, lecam_weight=0.01)
    changes = {"model": model, "discriminator": critic, "perceptual_weight": 0.1, "perceptual_start": 0.0}
    return run_of(pictures, output, batch_size=batch_size, steps=steps, learning_rate=1e-3, **changes)


STEPS = 20  # the discriminator begins in the third


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "alone"
    train(gan_run(pictures, output, 4, STEPS))
    return output


def assert_close_runs(one: Path, other: Path) -> None:
    for mine, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        for name in ("l1", "mse", "perceptual", "adversarial_loss", "adaptive_weight", "discriminator_loss"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), (mine["step"], name)
    states = [load_newest(output / "checkpoints") for output in (one, other)]
    assert [state["step"] for state in states] == [STEPS, STEPS]
    for part in (lambda state: state["discriminator"]["network"], lambda state: state["model"]):
        for name, value in part(states[0]).items():
            if name.rsplit(".", 1)[-1] not in ("window_counts", "last_used", "step", "seed"):
                torch.testing.assert_close(part(states[1])[name], value, rtol=1e-3, atol=1e-4, msg=name)
    models = [VQGAN.from_pretrained(output).state_dict() for output in (one, other)]
    torch.testing.assert_close(
        models[1]["encoder.conv_in.weight"], models[0]["encoder.conv_in.weight"], rtol=0, atol=1e-4
    )


def test_two_ranks_of_the_whole_loop_equal_one_process_over_twenty_steps(pictures, alone, tmp_path):
    train_with_torchrun(gan_run(pictures, tmp_path / "both", 2, STEPS), tmp_path)
    assert_close_runs(alone, tmp_path / "both")


def test_so_does_a_model_whose_weights_are_spread_over_them_and_resumed(pictures, alone, tmp_path):
    config = dataclasses.replace(gan_run(pictures, tmp_path / "both", 2, STEPS), sharding="full", checkpoint_every=12)
    train_with_two_ranks(config, tmp_path)
    assert_close_runs(alone, tmp_path / "both")
    whole = load_newest(tmp_path / "both" / "checkpoints")
    (tmp_path / "both" / "checkpoints" / f"step-{STEPS:08d}.pt").unlink()
    train_with_two_ranks(dataclasses.replace(config, resume=True), tmp_path)
    again = load_newest(tmp_path / "both" / "checkpoints")
    for part in ("model", "average", "optimizer", "discriminator"):
        for mine, theirs in zip(*(torch.utils._pytree.tree_leaves(each[part]) for each in (whole, again)), strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, part


def test_the_bundled_small_vqgan_is_what_it_says():
    config = load_config("vqgan-small")
    model = make_model(config.model)
    assert isinstance(model, VQGAN)
    assert isinstance(config.model, VQGANConfig)
    assert 0 < config.perceptual_start < config.discriminator.start_share < 1
    assert sum(weight.numel() for weight in model.parameters()) < 1e6

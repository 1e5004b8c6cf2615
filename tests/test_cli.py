"""The commands as a user meets them: help, each command on a tiny model, and one clear line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vqkernels.cli.main import COMMANDS, main

TINY = {
    "image_size": 16,
    "batch_size": 2,
    "steps": 3,
    "log_every": 1,
    "sample_every": 0,
    "checkpoint_every": 2,
    "warmup_steps": 0,
    "threads": 1,
    "device": "cpu",
    "model": {
        "channels": 8,
        "channel_multipliers": [1, 2, 2],
        "blocks": 1,
        "latent_channels": 4,
        "quantizer": {"codebook_size": 16, "dead_code_threshold": 0.0},
    },
}
FACTOR = 4


def _picture(seed: int, width: int, height: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with images/, config.yaml and the run of a model trained for three steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "images" / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "more/a.png")):
        _picture(number, 32, 24).save(folder / "images" / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(TINY))
    words = ["train", "-c", str(folder / "config.yaml"), "--data", str(folder / "images")]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def codes(tiny: Path) -> Path:
    """The codes of the tiny images, encoded one at a time."""
    target = tiny / "codes"
    words = [
        "encode",
        str(tiny / "run"),
        str(tiny / "images"),
        "-o",
        str(target),
        "--batch_size",
        "1",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    return target


def _mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must end with 2."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("vqkernels: error: ")
    assert error.count("\n") == 1, error
    return error


# Help


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_comes_without_torch(words: list[str]):
    code = (
        "import sys, contextlib\nfrom vqkernels.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main({words!r})\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: vqkernels" in done.stdout


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_version(capsys):
    import vqkernels

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vqkernels {vqkernels.__version__}\n"


# Commands end to end


def test_train_leaves_a_run_and_resumes_it(tiny: Path, capsys, tmp_path):
    words = [
        "train",
        "-c",
        str(tiny / "config.yaml"),
        "--data",
        str(tiny / "images"),
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert main([*words, "--resume", "--steps", "5"]) == 0
    assert "5 of 5" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 5


def test_train_names_and_counts_what_it_cannot_read(tiny: Path, tmp_path, capsys):
    _picture(1, 32, 24).save(tmp_path / "fine.png")
    for name in ("broken-one.png", "broken-two.jpg"):
        (tmp_path / name).write_bytes(b"not a picture")
    words = ["train", "-c", str(tiny / "config.yaml"), "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    assert main([*words, "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "skipped 2 files" in shown
    assert "broken-one.png" in shown
    assert "broken-two.jpg" in shown


def test_print_config_is_a_config_again(tiny: Path, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["train", "-c", str(tiny / "config.yaml"), "--print_config"])
    assert end.value.code in (0, None)
    written = yaml.safe_load(capsys.readouterr().out)
    assert written["model"]["quantizer"]["codebook_size"] == 16
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written))
    words = ["train", "-c", str(tmp_path / "again.yaml"), "--data", str(tiny / "images"), "--steps", "1"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0


def test_bundled_configs_are_found_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "-c", "demo", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["image_size"] == 64


def test_codes_have_the_files_of_the_folder(codes: Path):
    meta = json.loads((codes / "meta.json").read_text())
    assert meta["files"] == ["a.png", "b.jpg", "more/a.png"]
    array = np.load(codes / "codes.npy", mmap_mode="r")
    assert array.shape == (3, 24 // FACTOR, 32 // FACTOR)
    assert array.dtype == np.uint16
    assert array.max() < 16


def test_decode_of_encode_is_reconstruct(tiny: Path, codes: Path, tmp_path, capsys):
    run, images = str(tiny / "run"), str(tiny / "images")
    assert (
        main(["decode", run, str(codes), "-o", str(tmp_path / "decoded"), "--batch_size", "1", "--device", "cpu"]) == 0
    )
    assert main(["reconstruct", run, images, "-o", str(tmp_path / "direct"), "--device", "cpu"]) == 0
    assert "mean of 3" in capsys.readouterr().out
    for decoded, direct in (("a.png", "a.png"), ("b.png", "b.png"), ("more/a.png", "a-2.png")):
        one, other = Image.open(tmp_path / "decoded" / decoded), Image.open(tmp_path / "direct" / direct)
        assert one.size == (32, 24)
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_export_writes_an_encoder_and_a_decoder(tiny: Path, codes: Path, tmp_path, capsys):
    import torch

    assert main(["export", str(tiny / "run"), "-o", str(tmp_path / "graphs")]) == 0
    assert "takes" in capsys.readouterr().out
    decode = torch.export.load(tmp_path / "graphs" / "decoder.pt2").module()
    encode = torch.export.load(tmp_path / "graphs" / "encoder.pt2").module()
    array = torch.from_numpy(np.load(codes / "codes.npy").astype(np.int64))
    images = decode(array)
    assert images.shape == (3, 3, 24, 32)
    assert encode(images).shape == array.shape


@pytest.mark.parametrize(
    ("fit", "note", "size"),
    [("pad", "30x27 padded to 32x28 and cut back", (30, 27)), ("crop", "30x27 cropped to 28x24", (28, 24))],
)
def test_reconstruct_fits_odd_sizes_and_says_how(tiny: Path, tmp_path, capsys, monkeypatch, fit, note, size):
    monkeypatch.setenv("COLUMNS", "300")  # long paths would wrap the table's cells
    _picture(7, 30, 27).save(tmp_path / "odd.png")
    words = ["reconstruct", str(tiny / "run"), str(tmp_path / "odd.png"), "-o", str(tmp_path / "out"), "--fit", fit]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert note in shown
    assert "PSNR" in shown
    assert "SSIM" in shown
    assert Image.open(tmp_path / "out" / "odd.png").size == size
    assert (tmp_path / "out" / "odd-comparison.png").is_file()


def test_encode_scales_to_one_size_and_names_what_it_skips(tiny: Path, tmp_path, capsys):
    _picture(1, 50, 40).save(tmp_path / "large.png")
    _picture(2, 20, 33).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    words = ["encode", str(tiny / "run"), str(tmp_path), "-o", str(tmp_path / "codes"), "--image_size", "16"]
    assert main(words) == 0
    assert np.load(tmp_path / "codes" / "codes.npy").shape == (2, 4, 4)
    assert "broken.png" in capsys.readouterr().out


def test_info_says_what_runs_where(capsys):
    assert main(["info", "--dtype", "float64"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "instruction set", "nearest", "ema_update_", "reference", "float64"):
        assert word in shown


def test_build_says_where_the_library_is(capsys):
    from vqkernels import _extension

    possible = _extension.cpu_library() is None
    assert main(["build"]) == (0 if possible else 1)
    shown = capsys.readouterr().out
    assert "cache" in shown
    assert ("vqkernels_cpu" in shown or "_C" in shown) if possible else "not built" in shown


def test_bench_runs_the_given_shapes(tmp_path, capsys):
    words = ["bench", "--shape", "64,20,4", "--shape", "32,7,3", "--seconds", "0.1", "--check_rows", "16"]
    providers = ["--provider", "vqkernels-reference", "--provider", "torch-cdist", "--threads", "1"]
    assert main([*words, *providers, "--json", str(tmp_path / "report.json")]) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["cases"]) == 2
    assert "torch-cdist" in capsys.readouterr().out


# Mistakes: one line, exit code 2, no traceback


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["info", "--dtyp", "float32"], ["--dtyp", "did you mean 'dtype'"]),
        (["info", "--dtype", "int8"], ["--dtype", "'float32'", "got 'int8'"]),
        (["train", "--steps", "many"], ["--steps", "an integer", "got 'many'"]),
        (["train", "--model.quantizer.metric", "l2"], ["--model.quantizer.metric", "'cosine'", "got 'l2'"]),
        (["train", "--model.kind", "vqgam"], ["model.kind", "vqvae, vqgan", "'vqgam'"]),
        (["train", "--model.resolution", "64"], ["unknown argument --model.resolution"]),
        (["train", "--model.kind", "vqgan", "--model.norm_groups", "7"], ["norm_groups", "got 7"]),
        (["train", "--model.channels", "0"], [" model.channels must be at least 1, got 0"]),
        (["train", "--discriminator.channels", "0"], [" discriminator.channels must be at least 1, got 0"]),
        (["train", "--discriminator.crop", "2"], [" discriminator.crop must lie in [0, 1], got 2.0"]),
        (["train", "--model.quantizer.entropy.weight", "-1"], [" model.quantizer.entropy.weight must be 0 or greater"]),
        (["train", "--learning_rate", ".inf"], ["'learning_rate' must be a finite number, got inf"]),
        (["train", "--discriminator.weight", ".nan"], ["'discriminator.weight' must be a finite number, got nan"]),
        (["train", "--image_size", "33"], ["image_size", "factor 4", "got 33"]),
        (["train", "-c", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["train", "-c", "nowhere"], ["--config", "demo", "vqgan-small", "vqvae-f8", "nowhere"]),
        (["train", "--data", "nowhere"], ["nowhere", "does not exist"]),
        (["reconstruct", "nowhere/run", "x.png"], ["nowhere/run", "expected a folder with a model"]),
        (["reconstruct", "nowhere/run"], ["required", "images"]),
        (["decode", "nowhere/run", "codes"], ["nowhere/run"]),
        (["demo", "--seconds", "0"], ["--seconds", "positive", "got 0"]),
        (["demo", "--threads", "0"], ["--threads", "at least 1", "got 0"]),
        (["bench", "sort"], ["operation", "search", "got 'sort'"]),
        (["bench", "--shape", "1,2"], ["shape", "N,K,D", "got '1,2'"]),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = _mistake(words, capsys)
    assert all(part in error for part in said), error


def test_unknown_option_in_a_yaml_is_named_with_its_file(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("model:\n  quantizer:\n    codebok_size: 8\n")
    error = _mistake(["train", "-c", str(path)], capsys)
    assert "wrong.yaml" in error
    assert "'model.quantizer.codebok_size'" in error
    assert "did you mean 'model.quantizer.codebook_size'" in error


def test_wrong_value_in_a_yaml_is_named_with_its_file(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("steps: many\n")
    error = _mistake(["train", "-c", str(path)], capsys)
    assert "wrong.yaml: steps: expected an integer or null, got 'many'" in error
    path.write_text("discriminator:\n  channels: 0\n")
    assert "error: discriminator.channels must be at least 1, got 0" in _mistake(["train", "-c", str(path)], capsys)


def test_missing_image_and_empty_folder_are_named(tiny: Path, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = str(tiny / "run")
    assert "nothing.png" in _mistake(["reconstruct", run, str(tmp_path / "nothing.png")], capsys)
    assert "empty" in _mistake(["encode", run, str(tmp_path / "empty")], capsys)
    assert "meta.json" in _mistake(["decode", run, str(tmp_path / "empty")], capsys)


def test_images_of_several_sizes_need_an_image_size(tiny: Path, tmp_path, capsys):
    _picture(1, 32, 24).save(tmp_path / "a.png")
    _picture(2, 24, 32).save(tmp_path / "b.png")
    error = _mistake(["encode", str(tiny / "run"), str(tmp_path), "-o", str(tmp_path / "codes")], capsys)
    assert "b.png: expected 32x24 pixels" in error
    assert "got 24x32" in error
    assert not (tmp_path / "codes" / "codes.npy").exists()


def test_reconstruct_never_overwrites_its_input(tiny: Path, tmp_path, capsys):
    _picture(1, 32, 24).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    error = _mistake(["reconstruct", str(tiny / "run"), str(tmp_path), "-o", str(tmp_path)], capsys)
    assert "--output" in error
    assert (tmp_path / "a.png").read_bytes() == before


def test_decode_refuses_the_codes_of_another_model(tiny: Path, codes: Path, tmp_path, capsys):
    other = tmp_path / "other"
    words = ["train", "-c", str(tiny / "config.yaml"), "--data", str(tiny / "images"), "--seed", "1", "--steps", "1"]
    assert main([*words, "--output", str(other)]) == 0
    assert "model" in _mistake(["decode", str(other), str(codes), "-o", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_decode_refuses_codes_out_of_range(tiny: Path, codes: Path, tmp_path, capsys):
    (tmp_path / "meta.json").write_bytes((codes / "meta.json").read_bytes())
    array = np.load(codes / "codes.npy").copy()
    array[1, 2, 3] = 16
    np.save(tmp_path / "codes.npy", array)
    error = _mistake(["decode", str(tiny / "run"), str(tmp_path), "-o", str(tmp_path / "out")], capsys)
    assert "codes.npy" in error
    assert "[0, 15]" in error
    assert "to 16" in error


def test_decode_stays_inside_its_folder(tiny: Path, codes: Path, tmp_path, capsys):
    meta = json.loads((codes / "meta.json").read_text())
    meta["files"][0] = "../outside.png"
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "codes" / "codes.npy").write_bytes((codes / "codes.npy").read_bytes())
    error = _mistake(["decode", str(tiny / "run"), str(tmp_path / "codes"), "-o", str(tmp_path / "out")], capsys)
    assert "../outside.png" in error
    assert not (tmp_path / "outside.png").exists()


def test_a_checkpoint_of_another_architecture_is_named(tiny: Path, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((tiny / "run" / "model" / "config.json").read_text())
    (model / "model.safetensors").write_bytes((tiny / "run" / "model" / "model.safetensors").read_bytes())
    text = json.dumps(config).replace('"channels": 8', '"channels": 12')
    assert text != json.dumps(config)
    (model / "config.json").write_text(text)
    error = _mistake(["reconstruct", str(model), str(tiny / "images" / "a.png")], capsys)
    assert "model.safetensors does not fit the config" in error


def test_resume_of_another_architecture_names_the_option(tiny: Path, capsys):
    words = ["train", "-c", str(tiny / "config.yaml"), "--data", str(tiny / "images"), "--output", str(tiny / "run")]
    error = _mistake([*words, "--resume", "--model.channels", "12"], capsys)
    assert "model.channels is 12 now and was 8" in error


def test_an_existing_run_is_not_overwritten_unasked(tiny: Path, capsys):
    words = ["train", "-c", str(tiny / "config.yaml"), "--data", str(tiny / "images"), "--output", str(tiny / "run")]
    assert "already holds a run" in _mistake(words, capsys)


def test_debug_shows_the_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VQKERNELS_DEBUG", "1")
    assert main(["reconstruct", str(tmp_path / "nowhere"), "x.png"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tiny: Path, tmp_path, capsys, monkeypatch):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqkernels.cli.train.train", interrupted)
    words = ["train", "-c", str(tiny / "config.yaml"), "--data", str(tiny / "images"), "--output", str(tiny / "run")]
    assert main([*words, "--resume"]) == 130
    captured = capsys.readouterr()
    assert "--resume" in captured.out
    assert "step-00000003.pt" in captured.out
    assert "Traceback" not in captured.err


def test_a_models_own_default_of_its_quantizer_is_kept(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model.kind", "vit", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["quantizer"]
    assert (printed["codebook_size"], printed["codebook_dim"], printed["metric"]) == (8192, 32, "cosine")

"""`vqkernels demo` with a few seconds: everything it promises lies in its folder and agrees with its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vqkernels.models import held_out_photograph

from vqkernels.cli.main import main

ROWS = ("PSNR", "SSIM", "bits per pixel", "codes used", "perplexity", "quantizer")
CONTESTANTS = ("vqkernels.nearest", "torch.cdist + argmin", "x^2 + c^2 - 2xc, argmin", "the same under bf16 autocast")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a short demo, and what it printed."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("vqkernels.cli.demo_measure.LARGER_SHAPE", (256, 300, 8))
        assert main(["demo", "--seconds", "3", "-o", str(folder), "--threads", "1", "--device", "cpu"]) == 0
    return folder, printed.getvalue()


def test_leaves_all_its_files(demo):
    folder, _ = demo
    width, height = Image.open(folder / "astronaut.png").size
    assert width > 3 * 512  # input | reconstruction | codes
    assert height > 512
    assert np.load(folder / "codes" / "codes.npy").shape == (1, 128, 128)
    assert json.loads((folder / "codes" / "meta.json").read_text())["files"] == ["astronaut.png"]
    assert (folder / "model" / "model.safetensors").is_file()
    assert list((folder / "checkpoints").glob("*.pt"))
    assert list(folder.glob("events*"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out_psnr" in record for record in records)


def test_prints_the_closing_tables(demo):
    folder, printed = demo
    assert all(row in printed for row in ROWS)
    assert all(printed.count(name) == 2 for name in CONTESTANTS)
    for heading in ("time", "peak memory", "wrong codes"):
        assert heading in printed
    assert str(folder) in printed.replace("\n", "")


def test_our_codes_are_right_and_everything_was_measured(demo):
    folder, _ = demo
    report = json.loads((folder / "demo.json").read_text())
    assert 0 < report["quantizer_share"] < 1
    assert len(report["nearest"]) == 2
    for rows in report["nearest"].values():
        assert [row["name"] for row in rows] == list(CONTESTANTS)
        assert rows[0]["wrong"] == 0
        assert all(row["milliseconds"] > 0 and row["checked"] > 0 for row in rows if row["reason"] is None)


def test_the_saved_model_gives_the_same_figures(demo, tmp_path, capsys):
    folder, _ = demo
    capsys.readouterr()
    photograph = str(held_out_photograph())
    assert main(["reconstruct", str(folder), photograph, "-o", str(tmp_path), "--device", "cpu"]) == 0
    psnr = json.loads((folder / "demo.json").read_text())["held_out"]["PSNR"].removesuffix(" dB")
    assert psnr in capsys.readouterr().out


def test_its_codes_decode_to_the_reconstruction(demo, tmp_path):
    folder, _ = demo
    model, codes = str(folder), str(folder / "codes")
    assert main(["decode", model, codes, "-o", str(tmp_path / "decoded"), "--device", "cpu"]) == 0
    decoded = np.asarray(Image.open(tmp_path / "decoded" / "astronaut.png"))
    assert decoded.shape == (512, 512, 3)
    shown = np.asarray(Image.open(folder / "astronaut.png"))
    rows, columns = np.argwhere((shown == decoded[0, 0]).all(axis=2)).T
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    assert any(np.array_equal(shown[row : row + 512, left : left + 512], decoded) for row, left in places)


def test_does_not_replace_another_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'

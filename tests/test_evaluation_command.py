"""`vqkernels evaluate`: what it writes, shows and says of mistakes."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import PAIRS, SIZE, files_of, make_model, write_pictures
from PIL import Image
from vqkernels.models import (
    VQVAE,
    EvaluationOptions,
    evaluate_files,
    open_codes,
)
from vqkernels.models.crops import read_crops
from vqkernels.models.data import ImageFolder

from vqkernels.cli.evaluate_page import difference
from vqkernels.cli.main import main
from vqkernels.cli.options import EvaluateConfig


@pytest.fixture(scope="module")
def model() -> VQVAE:
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def report(model, folder):
    return evaluate_files(model, files_of(folder), EvaluationOptions(image_size=SIZE, batch_size=4, shown=2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(saved, folder, tmp_path_factory) -> Path:
    """The folder that the command leaves."""
    output = tmp_path_factory.mktemp("evaluation") / "out"
    words = ["evaluate", str(saved), str(folder), "-o", str(output), "--image_size", str(SIZE), "--shown", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    return output


NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
FIGURE = {
    "label": str, "unit": str, "better": str, "convention": str, "missing": str, "value": OPTIONAL, "images": int,
    "standard_error": OPTIONAL, "median": OPTIONAL, "minimum": OPTIONAL, "maximum": OPTIONAL,
}  # fmt: skip
MAP = {
    "rows": int, "columns": int, "codebook_size": int, "tokens": int, "used": int, "usage": NUMBER,
    "perplexity": NUMBER, "entropy_bits": NUMBER, "curve": list,
}  # fmt: skip
SCHEMA = {
    "format": str,
    "model": {"class": str, "fingerprint": str, "parameters": int, "factor": int, "config": dict, "source": str},
    "images": {"count": int, "size": int, "crop": str},
    "options": {entry.name: (str, int, type(None)) for entry in dataclasses.fields(EvaluationOptions)},
    "figures": dict.fromkeys((*PAIRS, "lpips", "rfid"), FIGURE),
    "codes": {"maps": [MAP], "bits_per_pixel": NUMBER, "entropy_bits_per_pixel": NUMBER},
    "per_image": [{"file": str, "psnr": NUMBER, "ssim": NUMBER, "l1": NUMBER}],
    "skipped": [{"file": str, "reason": str}],
    "warnings": list,
    "weights": dict,
    "device": str,
    "seconds": NUMBER,
    "versions": {"vqkernels": str, "torch": str, "numpy": str, "pillow": str},
}


def _check_schema(value, schema, place: str = "document") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        assert set(value) == set(schema), place
        for key, inner in schema.items():
            _check_schema(value[key], inner, f"{place}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        assert value, place
        for each in value:
            _check_schema(each, schema[0], place)
    else:
        assert isinstance(value, schema), (place, value)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_the_json_holds_everything(written, report):
    document = json.loads((written / "evaluation.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    _check_schema(document, SCHEMA)
    assert document["images"]["count"] == len(document["per_image"]) == 9
    assert document["figures"]["psnr"]["value"] == pytest.approx(report.figures["psnr"].value, rel=1e-6)
    assert document["figures"]["rfid"]["value"] is None
    assert document["model"]["fingerprint"] == report.model["fingerprint"]
    assert {Path(entry["file"]).name for entry in document["skipped"]} == {"one.png", "torn.png"}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(written, report):
    markup = (written / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(markup)
    assert page.open == []
    sections = {"worst", "best", "spread", "codes", "figures", "skipped", "run"}
    assert set(page.ids) == sections | {f"{name}-title" for name in sections}
    assert not re.search(r"https?:|@import|url\(", markup)
    assert len(page.images) == 4 * 4
    shown = []
    for image in page.images:
        assert image["alt"]
        data = image["src"].removeprefix("data:image/png;base64,")
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    first = report.worst[0]
    assert (shown[0] == first.image.permute(1, 2, 0).numpy()).all()
    assert (shown[2] == difference(first.image, first.reconstruction).permute(1, 2, 0).numpy()).all()
    assert shown[3].shape == (SIZE // 4, SIZE // 4, 3)
    text = " ".join(page.text)
    for figure in report.figures.values():
        assert figure.kind.label in text
        assert figure.kind.convention in text
    assert f"{report.figures['psnr'].text()} dB" in text
    assert "cannot read image" in text


def test_the_difference_is_amplified_and_clipped():
    image, other = (torch.tensor(values, dtype=torch.uint8).view(1, 1, 4) for values in ([0, 9, 250, 7], [2, 6, 0, 7]))
    assert difference(image, other).flatten().tolist() == [8, 12, 255, 0]


def test_the_table_shows_what_was_measured_and_what_not(saved, folder, tmp_path, capsys):
    words = ["evaluate", str(saved), str(folder / "0.png"), "-o", str(tmp_path / "out"), "--image_size", str(SIZE)]
    assert main([*words, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "VQVAE on 1 picture of 32 x 32" in shown
    for expected in (r"PSNR, dB +\d+\.\d\d ", r"LPIPS \(VGG16\) +- ", r"rFID +- ", r"perplexity +\d", r"MS-SSIM +- "):
        assert re.search(expected, shown), (expected, shown)
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_has_the_options_of_the_function():
    config = EvaluateConfig("model", ["image"])
    for entry in dataclasses.fields(EvaluationOptions):
        assert getattr(config, entry.name) == entry.default, entry.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image_size", "30"], "image_size must be a multiple of the model's factor 4, got 30"),
        (["--image_size", "0"], "image_size must be at least 1, got 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--lpips", "weights.pth"], "vgg must be given where lpips is"),
        (["--inception", "missing.pth"], "missing.pth: no such file"),
        (["--vgg", "missing.pth"], "missing.pth"),
        (["--inception", "TORN"], "expected a file that ends in"),
        (["--pixels", "int4"], "one of 'uint8', 'float'"),
        (["--inceptio", "x"], "did you mean 'inception'"),
    ],
)
def test_mistakes_are_one_line(saved, folder, tmp_path, capsys, words, said):
    words = [str(folder / "torn.png") if word == "TORN" else word for word in words]
    base = ["evaluate", str(saved), str(folder), "-o", str(tmp_path / "out"), "--device", "cpu"]
    size = [] if "--image_size" in words else ["--image_size", str(SIZE)]
    assert main([*base, *size, *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_readable_picture_is_named(saved, folder, tmp_path, capsys):
    words = ["evaluate", str(saved), str(folder / "torn.png"), str(folder / "one.png"), "--image_size", str(SIZE)]
    assert main([*words, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "none of the 2 images can be read; the first: cannot read image" in said
    assert "torn.png" in said


def test_encoding_evaluation_and_held_out_figures_see_the_same_pixels(model, saved, folder, report, tmp_path):
    files = [Path(file) for file in report.files]
    crops = torch.stack([crop for _, crop in read_crops(files, SIZE, [])]).float() / 127.5 - 1
    held_out = ImageFolder(files, SIZE, augment=False)
    assert torch.equal(torch.stack([held_out[place] for place in range(len(files))]), crops)
    words = ["encode", str(saved), str(folder), "-o", str(tmp_path), "--image_size", str(SIZE), "--device", "cpu"]
    assert main(words) == 0
    codes = open_codes(tmp_path, model)
    assert codes.meta.files == [file.name for file in files]
    for example in report.worst:
        place = report.files.index(example.file)
        assert np.array_equal(codes.codes[place], example.codes[0].numpy())

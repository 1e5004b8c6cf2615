"""`vqkernels profile` as its user meets it: three files whose numbers agree, on drawn data, own data and a training."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from profiles import SECTIONS, TRAINING, D, K, N, parse_page, profile
from safetensors.torch import save_file

import vqkernels
from vqkernels.backends import use_backend
from vqkernels.cli.main import main
from vqkernels.cli.profile_inputs import load_codebook, load_tokens
from vqkernels.profiling import units
from vqkernels.profiling.advice import hints
from vqkernels.profiling.measure import measure_subject
from vqkernels.profiling.page import render
from vqkernels.profiling.peaks import Peaks
from vqkernels.profiling.roofline import Sizes, kernel_work, place
from vqkernels.profiling.search import STAGES
from vqkernels.profiling.subject import StepOptions, Subject
from vqkernels.profiling.svg import Box, Labels, LogAxis


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the document of a drawn problem."""
    folder = tmp_path_factory.mktemp("profile")
    return folder, profile(folder, "--shape", f"{N},{K},{D}")


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the document of a tiny model's training, on generated pictures."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "model.yaml").write_text(yaml.safe_dump(TRAINING))
    return folder, profile(folder, "--config", str(folder / "model.yaml"), "--steps", "3")


# The numbers


def test_the_stages_add_up_to_the_call(shape):
    search = shape[1]["search"]
    for kind in ("unchanged", "changed"):
        found = search[kind]
        assert set(found["stages"]) == {*STAGES, "other"}
        assert min(found["stages"].values()) >= 0
        assert sum(found["stages"].values()) == pytest.approx(found["seconds"], rel=1e-6)
    assert search["unchanged"]["prepared_from_cache"]
    assert not search["changed"]["prepared_from_cache"]
    assert search["changed"]["stages"]["prepare"] > 0


def test_the_training_step_adds_up(shape):
    step, changed = shape[1]["step"], shape[1]["search"]["changed"]
    assert sum(step["stages"].values()) == pytest.approx(step["seconds"])
    assert {name: step["stages"][name] for name in changed["stages"]} == changed["stages"]
    assert set(step["stages"]) - set(changed["stages"]) == {"gather", "losses", "statistics", "ema", "backward"}


def test_shares_and_counts_are_possible(shape):
    document = shape[1]
    inside, use = document["search"]["unchanged"], document["code_use"]
    assert inside["tokens"] == N
    assert 0 <= inside["certified"] + inside["scanned"] <= N
    assert inside["certified_share"] == inside["certified"] / N
    assert 0 <= use["usage"] <= 1 <= use["perplexity"] <= use["codes_used"] <= K
    assert inside["candidates_per_token"] >= 1 or inside["scanned"] == N


def test_code_use_is_that_of_the_search(shape):
    x, codebook = torch.randn(50, 3), torch.randn(7, 3)
    from vqkernels.profiling.subject import code_use

    codes = vqkernels.nearest(x, codebook)[0]
    assert code_use(Subject(x, codebook, "test"))["codes_used"] == len(codes.unique())


def test_kernels_lie_where_their_formulas_say(shape):
    document = shape[1]
    kernels, peaks = document["kernels"], document["peaks"]
    assert {"search", "gather", "statistics", "ema", "backward"} <= set(kernels)
    assert kernels["search"]["flops"] == 2 * N * K * D
    assert kernels["search"]["bytes"] == 4 * (N * D + K * D) + 12 * N
    for kernel in kernels.values():
        assert kernel["intensity"] == pytest.approx(kernel["flops"] / kernel["bytes"])
        assert kernel["flops_per_second"] == pytest.approx(kernel["flops"] / kernel["seconds"])
        reachable = min(max(peaks["rates"].values()), peaks["bandwidth"] * kernel["intensity"])
        assert 0 < kernel["roof_flops_per_second"] <= reachable * (1 + 1e-9)
        assert kernel["share_of_roof"] > 0


@pytest.mark.parametrize(
    ("coarse_pass", "ceiling"),
    [
        ("byte", "byte"),
        ("int8", "int8"),
        ("int16", "int16"),
        ("float32", "float32"),
        ("float64", "float32"),
        (None, "int8"),
    ],
)
def test_the_search_is_held_against_the_arithmetic_that_it_ran(coarse_pass, ceiling):
    rates = {"int8": 2e12, "byte": 6e11, "int16": 4e11, "float32": 2e11}
    work = kernel_work(Sizes(1000, 1000, 100, 4), StepOptions(), coarse_pass=coarse_pass, rates=rates)
    assert work["search"].rate == ceiling
    assert ("coarse" in work) == (coarse_pass is not None)


def test_the_roof_is_the_lower_of_peak_and_bandwidth():
    peaks = Peaks({"float32": 100.0}, bandwidth=10.0, cache_bandwidth=None, method={})
    work = kernel_work(
        Sizes(1000, 1000, 1000, 4), StepOptions(gradient="rotation"), coarse_pass=None, rates=peaks.rates
    )
    busy = place(work["search"], seconds=work["search"].flops / 50.0, peaks=peaks)
    assert (busy["ceiling"], busy["share_of_roof"], busy["share_of_peak"]) == ("float32", 0.5, 0.5)
    starved = place(work["ema"], seconds=work["ema"].bytes / 5.0, peaks=peaks)
    assert starved["ceiling"] == "bandwidth"
    assert starved["share_of_roof"] == pytest.approx(0.5)


def test_memory_is_measured_beside_the_formula(shape):
    memory = shape[1]["memory"]
    assert memory["ours_bytes"] is not None, memory["ours_method"]
    assert memory["inputs_bytes"] == 4 * (N + K) * D
    assert memory["scores_bytes"] == 4 * N * K
    assert memory["one_hot_bytes"] == 12 * N * K
    assert memory["entropy"] is None


def test_profiling_changes_neither_tokens_nor_codes():
    x, codebook = torch.randn(40, 5), torch.randn(9, 5)
    before = x.clone(), codebook.clone()
    measure_subject(Subject(x, codebook, "test"), seconds=0.01, threads=1)
    assert torch.equal(x, before[0])
    assert torch.equal(codebook, before[1])


def test_a_backend_that_cannot_be_seen_from_inside_says_so(shape):
    subject = Subject(torch.randn(30, 4), torch.randn(6, 4), "test", StepOptions(gradient="rotation"))
    with use_backend("reference"):
        document = measure_subject(subject, seconds=0.01, threads=1)
    assert document["search"]["unchanged"] is None
    assert "runs on reference" in document["search"]["not_seen_because"]
    assert document["step"]["stages"]["search"] == document["search"]["seconds"]
    document |= {name: shape[1][name] for name in ("memory", "trace")}
    shown = "".join(parse_page(render(document)).text)
    assert "runs on reference" in shown
    assert "Certified" not in shown


# The page and the trace


def test_the_page_holds_every_section_and_nothing_from_outside(shape):
    markup = (shape[0] / "report.html").read_text()
    page = parse_page(markup)
    assert set(page.ids) == SECTIONS | {f"{name}-title" for name in SECTIONS}
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"https?:|//\w+\.|@import|url\(", markup)
    assert "prefers-color-scheme: dark" in markup
    assert "@media print" in markup


def test_the_page_says_what_was_measured(shape):
    folder, document = shape
    shown = "".join(parse_page((folder / "report.html").read_text()).text).replace("\u202f", "")
    assert f"{N} tokens × {K} codes × {D} dimensions" in shown
    assert units.seconds(document["search"]["seconds"]) in shown
    assert document["machine"]["cpu"] in shown
    assert document["versions"]["torch"] in shown
    for what, help_ in hints(document):
        assert what in shown
        assert help_ in shown
    for kernel in document["kernels"].values():
        assert kernel["bytes_formula"] in shown


def test_pictures_name_every_kernel_for_those_who_cannot_see_them(shape):
    folder, document = shape
    labels = re.findall(r'aria-label="([^"]*)"', (folder / "report.html").read_text())
    roofline = [label for label in labels if label.startswith("Roofline")]
    assert len(roofline) == 2
    assert all(name in label for label in roofline for name in document["kernels"])


def test_the_trace_holds_a_range_for_every_kernel(shape):
    folder, document = shape
    with gzip.open(folder / document["trace"]["file"], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"vqkernels.{name}" for name in ("search", "gather", "losses", "statistics", "ema", "backward")} <= names
    assert document["trace"]["operators"]


def test_labels_keep_out_of_each_others_way():
    labels = Labels(Box(0, 0, 400, 300), size=12, gap=11)
    points = [(100 + 3 * place, 100 + 2 * place) for place in range(5)]
    for x, y in points:
        labels.reserve(x, y, 6)
    for x, y in points:
        labels.place("a label", x, y)
    boxes = labels.taken[len(points) :]
    assert len(boxes) == len(points)
    assert not any(box.meets(other) for place, box in enumerate(labels.taken) for other in boxes if other is not box
                   and place >= len(points))  # fmt: skip


def test_axes_put_decades_where_they_belong():
    axis = LogAxis(0.5, 2000, 0, 360)
    assert axis.decades() == [1, 10, 100, 1000]
    assert axis.at(0.5) == 0
    assert axis.at(2000) == pytest.approx(360)
    assert axis.at(100) - axis.at(10) == pytest.approx(axis.at(10) - axis.at(1))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.seconds(0.3141), "314 ms"),
        (units.seconds(0.9999), "1.00 s"),
        (units.seconds(42.04e-3), "42.0 ms"),
        (units.seconds(0), "0 s"),
        (units.scaled(407.4e9, "FLOP/s"), "407 GFLOP/s"),
        (units.scaled(1.0737e9, "B"), "1.07 GB"),
        (units.percent(0.9914), "99.1 %"),
        (units.percent(0.99999), "> 99.9 %"),
        (units.percent(1.0), "100 %"),
        (units.percent(0.123), "12 %"),
        (units.percent(0.00001), "< 0.1 %"),
        (units.digits(9.999), "10.0"),
        (units.digits(0.24949), "0.249"),
    ],
)
def test_numbers_are_written_in_three_digits(written, expected):
    assert written == expected


# Own data


def test_own_tokens_and_codebook(tmp_path):
    tokens = np.random.default_rng(0).standard_normal((3, 20, 5)).astype(np.float32)
    np.save(tmp_path / "a<b>&.npy", tokens)
    codebook = torch.randn(11, 5)
    state = {"quantizer.codebook": codebook, "quantizer.embed_sum": codebook, "decoder.weight": torch.randn(11, 5)}
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    words = ["--tokens", str(tmp_path / "a<b>&.npy"), "--codebook", str(tmp_path / "model.safetensors")]
    document = profile(tmp_path / "out", *words, "--metric", "cosine", "--dtype", "float64")
    subject = document["subject"]
    assert (subject["tokens"], subject["codes"], subject["dim"]) == (60, 11, 5)
    assert (subject["metric"], subject["dtype"]) == ("cosine", "float64")
    assert "a<b>&.npy" in "".join(parse_page((tmp_path / "out" / "report.html").read_text()).text)


def test_codebooks_are_found_in_checkpoints(tmp_path):
    codebook = torch.randn(4, 3)
    torch.save({"state_dict": {"vq.embedding.weight": codebook, "vq.cluster_size": torch.ones(4)}}, tmp_path / "a.pt")
    torch.save(codebook, tmp_path / "b.pt")
    torch.save({"model": {"a.codebook": codebook, "b.codebook": codebook + 1}}, tmp_path / "c.pt")
    np.save(tmp_path / "d.npy", codebook.numpy())
    for name in ("a.pt", "b.pt", "d.npy"):
        assert torch.equal(load_codebook(str(tmp_path / name), None, 3), codebook)
    assert torch.equal(load_codebook(str(tmp_path / "c.pt"), "b.codebook", 3), codebook + 1)
    with pytest.raises(ValueError, match=r"found 2; name it with --codebook_name, one of a\.codebook, b\.codebook"):
        load_codebook(str(tmp_path / "c.pt"), None, 3)
    with pytest.raises(ValueError, match="expected codes"):
        load_codebook(str(tmp_path / "d.npy"), None, 4)


def test_tokens_that_are_none(tmp_path):
    np.save(tmp_path / "codes.npy", np.zeros((4, 4), dtype=np.int64))
    with pytest.raises(ValueError, match="expected floating point numbers, got int64"):
        load_tokens(str(tmp_path / "codes.npy"))
    (tmp_path / "text.npy").write_text("no numbers")
    with pytest.raises(ValueError, match=r"expected an \.npy file"):
        load_tokens(str(tmp_path / "text.npy"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected one of --shape, --tokens with --codebook, or a training config"),
        (["--shape", "1,2,3", "--config", "demo"], "expected one of"),
        (["--tokens", "x.npy"], "--tokens and --codebook: expected both"),
        (["--shape", "1,2"], "expected N,K,D"),
        (["--shape", "1,2,3", "--steps", "0"], "--steps: expected a positive number, got 0"),
        (
            ["--shape", "1,2,3", "--entropy_temperature", "0"],
            "--entropy_temperature: expected a positive number, got 0",
        ),
        (["--shape", "1,2,3", "--kmeans_iterations", "-1"], "--kmeans_iterations: expected a positive number, got -1"),
        (["--shape", "1,2,3", "--metric", "dot"], "--metric dot: expected --gradient index_propagation with it"),
        (
            ["--shape", "1,2,3", "--gradient", "index_propagation", "--update", "ema"],
            "--update: expected gradient with --gradient index_propagation, got ema",
        ),
        (["--shape", "1,2,3", "--images", "x"], "--images: expected a training config"),
        (["--tokens", "none.npy", "--codebook", "none.npy"], "No such file"),
        (["-c", "nowhere.yaml"], "neither a file nor a bundled config"),
    ],
)
def test_mistakes_are_one_clear_line(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


# Training


def test_the_share_of_the_training_step(training):
    document = training[1]["training"]
    parts = document["parts"]
    assert set(parts) == {"quantizer forward", "quantizer backward", "codebook update", "rest"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(document["step_seconds"])
    assert 0 < document["quantizer_share"] < 1
    assert document["steps"] == 3
    assert "generated" in document["pictures"]


def test_a_training_config_is_profiled_on_its_own_tokens(training):
    folder, document = training
    subject = document["subject"]
    assert (subject["tokens"], subject["codes"], subject["dim"]) == (2 * 8 * 8, 16, 4)
    assert "encoder" in subject["source"]
    page = parse_page((folder / "report.html").read_text())
    assert "training" in page.ids
    assert "generated pictures" in "".join(page.text)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.yaml", "report.html", "report.json", "trace.json.gz",
    ]  # fmt: skip


def test_the_trace_of_a_training_step_names_the_quantizer(training):
    folder, document = training
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"quantizer forward", "quantizer codebook update"} <= names
    assert document["trace"]["of"] == "one training step"

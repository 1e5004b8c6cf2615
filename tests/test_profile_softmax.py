"""`vqkernels profile` on what meets the whole codebook: entropy loss, drawn codes, index propagation; and k-means."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from profiles import QUICK, SECTIONS, TRAINING, D, K, N, parse_page, profile
from vqkernels.benchmarks.memory import Peak

import vqkernels
from vqkernels.cli.main import main
from vqkernels.cli.profile_training import PARTS as SPANS
from vqkernels.cli.profile_training import QuantizerWatch
from vqkernels.nn import EntropyOptions, VectorQuantizer
from vqkernels.profiling.clock import Clock
from vqkernels.profiling.kmeans import Lloyd
from vqkernels.profiling.measure import measure_subject
from vqkernels.profiling.page import WORDS
from vqkernels.profiling.subject import StepOptions, Subject


@pytest.fixture(scope="module")
def softmax(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the document of a step with an entropy loss, and of k-means."""
    folder = tmp_path_factory.mktemp("softmax")
    words = ["--entropy_temperature", "2", "--kmeans_iterations", "3"]
    return folder, profile(folder, "--shape", f"{N},{K},{D}", *words)


@pytest.fixture
def no_memory(monkeypatch):
    """Spares a test that looks at other things the processes in which memory is measured."""

    def nothing(names: list[str], *_problem: object, threads: int) -> dict[str, Peak]:
        return {name: Peak(None, "not asked for") for name in names}

    monkeypatch.setattr("vqkernels.profiling.measure.peak_memory", nothing)


def test_the_entropy_loss_is_part_of_the_step(softmax):
    document = softmax[1]
    step, kernels = document["step"], document["kernels"]
    assert {"entropy forward", "entropy backward", "statistics", "ema"} < set(step["stages"])
    assert sum(step["stages"].values()) == pytest.approx(step["seconds"])
    assert kernels["entropy forward"]["flops"] == 4 * N * K * D
    assert kernels["entropy backward"]["flops"] == 4 * N * K * D  # moving averages: no gradient of the codebook
    assert kernels["entropy forward"]["bytes"] == 4 * (N * D + K * D) + 8 * N + 4 * K
    assert kernels["entropy forward"]["seconds"] == step["stages"]["entropy forward"]
    assert document["subject"]["entropy"]["temperature"] == 2
    assert document["subject"]["backends"]["softmax_code_sums"]


def test_the_entropy_loss_has_its_memory_beside_the_unfused_form(softmax):
    memory = softmax[1]["memory"]["entropy"]
    assert memory["ours_bytes"] is not None, memory["ours_method"]
    assert memory["probabilities_bytes"] == 4 * N * K
    assert memory["autograd_bytes"] == 12 * N * K


def test_the_page_shows_the_entropy_loss_and_kmeans(softmax):
    folder, document = softmax
    page = parse_page((folder / "report.html").read_text())
    assert set(page.ids) == {name for each in SECTIONS | {"kmeans"} for name in (each, f"{each}-title")}
    shown = "".join(page.text)
    for kernel in ("entropy forward", "entropy backward", "k-means assignment", "k-means sums", "k-means update"):
        assert kernel in document["kernels"]
        assert document["kernels"][kernel]["flops_formula"] in shown
    assert document["memory"]["entropy"]["autograd_formula"] in shown
    assert WORDS["entropy backward"] in shown
    assert WORDS["propagation"] not in shown  # no part of this step
    with gzip.open(folder / document["trace"]["file"], "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"vqkernels.entropy forward", "vqkernels.entropy backward"} <= names


def test_kmeans_adds_up(softmax):
    kmeans = softmax[1]["kmeans"]
    assert set(kmeans["stages"]) == {"start", "assignment", "sums", "update", "last pass"}
    assert min(kmeans["stages"].values()) > 0
    assert sum(kmeans["stages"].values()) == pytest.approx(kmeans["seconds"])
    assert len(kmeans["rounds"]) == kmeans["iterations"] == 3
    for name in ("assignment", "sums", "update"):
        assert sum(each[name] for each in kmeans["rounds"]) == pytest.approx(kmeans["stages"][name])
    passed = [*(each["inertia"] for each in kmeans["rounds"]), kmeans["inertia"]]
    assert passed == sorted(passed, reverse=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_in_the_profile_is_kmeans(metric):
    x, count = torch.randn(200, 6), 9
    lloyd = Lloyd(Subject(x, torch.randn(count, 6), "test", StepOptions(metric=metric)), seed=3)
    for _ in range(4):
        lloyd.iterate()
    expected = vqkernels.kmeans(x, count, iterations=4, metric=metric, seed=3)
    assert torch.equal(lloyd.rows, expected.centroids)
    assert lloyd.finish()[1] == float(expected.inertia)


@pytest.mark.usefixtures("no_memory")
def test_index_propagation_has_a_step_of_its_own(tmp_path):
    words = ["--gradient", "index_propagation", "--metric", "dot", "--entropy_temperature", "0.5"]
    document = profile(tmp_path, "--shape", "60,20,5", *words)
    parts = {"search", "gather", "losses", "propagation", "entropy forward", "entropy backward"}
    assert set(document["step"]["stages"]) == parts
    assert document["kernels"]["propagation"]["flops"] == 10 * 60 * 20 * 5
    assert document["kernels"]["entropy backward"]["flops"] == 6 * 60 * 20 * 5
    assert document["kernels"]["search"]["ceiling"] in ("float32", "bandwidth")
    assert document["memory"]["ours_bytes"] is None
    assert "plain torch" in document["search"]["not_seen_because"]
    assert "largest product" in "".join(parse_page((tmp_path / "report.html").read_text()).text)


def test_products_choose_what_index_propagation_chooses():
    x, codebook = torch.randn(50, 4), torch.randn(11, 4)
    options = StepOptions(metric="dot", gradient="index_propagation", update="gradient")
    assert torch.equal(Subject(x, codebook, "test", options).codes, vqkernels.index_propagation(x, codebook).codes)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_step_is_that_of_its_options(update):
    options = StepOptions(update=update, sampling_temperature=0.5, entropy=EntropyOptions(batch_weight=0.0))
    document = measure_subject(Subject(torch.randn(40, 3), torch.randn(8, 3), "t", options), seconds=0.01, threads=1)
    learning = {"ema": {"statistics", "ema"}, "gradient": {"codebook gradient"}}[update]
    expected = {"sampling", "gather", "losses", *learning, "backward", "entropy forward", "entropy backward"}
    assert set(document["step"]["stages"]) == expected  # codes are drawn: no search
    assert expected - {"losses"} < set(document["kernels"])
    assert document["kernels"]["entropy forward"]["flops"] == 2 * 40 * 8 * 3  # no mean distribution
    assert "softmax_sample" in document["subject"]["backends"]
    assert "softmax_code_sums" not in document["subject"]["backends"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metric": "dot"}, "metric: expected dot only"),
        ({"gradient": "index_propagation"}, "update: expected gradient"),
        (
            {"gradient": "index_propagation", "update": "gradient", "sampling_temperature": 1.0},
            "sampling_temperature: expected 0",
        ),
    ],
)
def test_steps_that_no_quantizer_makes(options, expected):
    with pytest.raises(ValueError, match=expected):
        StepOptions(**options)


# Training


def _train(folder: Path, *words: str, **quantizer: object) -> dict:
    model = {**TRAINING["model"], "quantizer": quantizer}
    (folder / "model.yaml").write_text(yaml.safe_dump({**TRAINING, "model": model}))
    return profile(folder, "--config", str(folder / "model.yaml"), "--steps", "2", *words)


@pytest.mark.usefixtures("no_memory")
def test_the_entropy_loss_of_a_training_config_is_a_part_of_its_step(tmp_path):
    entropy = {"weight": 0.1, "temperature": 0.5}
    document = _train(
        tmp_path, codebook_size=16, codebook_dim=4, dead_code_threshold=0.0, entropy=entropy, sampling_temperature=0.7
    )
    parts = document["training"]["parts"]
    inside = {"quantizer forward", "quantizer backward", "codebook update", "entropy forward", "entropy backward"}
    assert set(parts) == inside | {"rest"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(document["training"]["step_seconds"])
    assert document["subject"]["entropy"]["temperature"] == 0.5
    assert {"sampling", "entropy forward", "entropy backward"} < set(document["step"]["stages"])


@pytest.mark.usefixtures("no_memory")
def test_a_training_config_with_index_propagation(tmp_path):
    entropy = {"weight": 0.1, "temperature": 0.5}
    quantizer = {"codebook_size": 16, "metric": "dot", "gradient": "index_propagation", "update": "gradient"}
    document = _train(tmp_path, **quantizer, entropy=entropy)
    parts = document["training"]["parts"]
    assert {"quantizer forward", "quantizer backward", "entropy forward", "entropy backward"} < set(parts)
    assert sum(parts.values()) == pytest.approx(document["training"]["step_seconds"])
    assert (document["subject"]["metric"], document["subject"]["gradient"]) == ("dot", "index_propagation")
    assert "propagation" in document["step"]["stages"]


def test_spans_of_the_entropy_loss_are_no_part_of_the_quantizers():
    """With a clock that counts its own calls: spans of one step may touch, but none lies inside another."""
    quantizer = VectorQuantizer(4, 8, entropy=EntropyOptions())
    clock = Clock(torch.device("cpu"))
    clock.now = itertools.count().__next__
    watch = QuantizerWatch(quantizer, clock, [])
    tokens = torch.randn(20, 4, requires_grad=True)
    out = quantizer(tokens * 1)
    (out.quantized.square().mean() + out.loss).backward()
    assert {name for name, *_ in watch.spans} >= set(SPANS) - {"codebook update"}
    spans = sorted((start, end) for _, _, start, end in watch.spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"quantizer": {"kind": "lfq", "codebook_dim": 4}}, "(kind vq), got a quantizer of kind lfq"),
        ({"kind": "vqvae2"}, "(kind vq), got a model of kind vqvae2"),
    ],
)
def test_models_without_a_single_codebook_are_refused(model, expected, capsys, tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    words = ["--config", str(tmp_path / "model.yaml"), *QUICK, "--out", str(tmp_path / "out")]
    assert main(["profile", *words]) == 2
    assert expected in capsys.readouterr().err

"""What ``vqkernels bench`` draws, writes to and divides by: distributions, shapes, peaks, stand-ins."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch
from requirements import skip_or_fail
from vqkernels.benchmarks.config import Data
from vqkernels.benchmarks.data import KINDS, kmeans_codebook, make_inputs
from vqkernels.benchmarks.peaks import Peaks
from vqkernels.benchmarks.problem import Touch, make_problem
from vqkernels.benchmarks.providers import choose
from vqkernels.benchmarks.report import add_timing, new_entry
from vqkernels.benchmarks.runner import Timing
from vqkernels.benchmarks.shapes import NAMED, Shape, parse_shape

from vqkernels.testing import true_codes


def test_the_distributions_are_those_of_the_command_line_and_what_they_say():
    assert set(KINDS) == set(get_args(Data))
    inputs = {data: make_inputs(Shape(300, 64, 16), data, seed=3) for data in KINDS}
    assert all((x.shape, c.shape) == ((300, 16), (64, 16)) for x, c in inputs.values())
    assert all(torch.equal(x, make_inputs(Shape(300, 64, 16), data, seed=3)[0]) for data, (x, _) in inputs.items())
    torch.testing.assert_close(inputs["unit"][1].norm(dim=1), torch.ones(64))
    assert inputs["init"][1].abs().max() <= 1 / 64
    assert inputs["offset"][0].mean().item() == pytest.approx(100, abs=0.1)
    group = inputs["near-duplicates"][1][:8]
    assert torch.pdist(group.double()).median().item() == pytest.approx(1e-4, rel=0.2)
    assert inputs["mixed-scales"][1].norm(dim=1).aminmax().max > 1e4 * inputs["mixed-scales"][1].norm(dim=1).min()
    assert torch.equal(inputs["same"][1], inputs["same"][1][:1].expand(64, 16))
    assert torch.pdist(inputs["near-ties"][1][::4].double()).max() < 1e-4
    assert inputs["outlier"][1].norm(dim=1).max() > 1e5 * inputs["outlier"][1].norm(dim=1).median()


@pytest.mark.parametrize("flat", [64, 2048])
def test_a_kmeans_codebook_is_nearer_than_random_tokens(flat, monkeypatch):
    monkeypatch.setattr("vqkernels.benchmarks.data.KMEANS_FLAT", flat)
    tokens = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    codebook = kmeans_codebook(tokens, 100, torch.Generator().manual_seed(2))
    assert codebook.shape == (100, 3)

    def error(codes):  # [K, D]
        return (tokens - codes[true_codes(tokens, codes)]).square().sum().item()

    assert error(codebook) < 0.8 * error(tokens[:100])


def test_touch_never_returns_to_numbers_that_were_there():
    codebook = torch.tensor([[1.5, 2.0]])
    touch = Touch(codebook)
    for step in (1, 2, 3):
        touch()
        assert torch.equal(codebook, torch.tensor([[1.5 + step * 2.0**-23, 2.0]]))


def test_percentages_are_medians_of_rounds_and_integers_are_for_passes_that_have_some():
    problem, peaks = make_problem("search", Shape(10, 10, 5)), Peaks("cpu", 1)
    peaks.rates = {"float32": [1e3, 2e3, 1e3], "int16": [2e3, 4e3, 2e3], "sgemm": [1e3, 1e3, 1e3]}
    timing = Timing([1.0, 0.5, 2.0], 1)  # 1000 FLOP: all, all and half of the fp32 peak of the round
    (ours,) = choose("search", ["vqkernels-compiled"])
    entry = new_entry(ours)
    add_timing(entry, timing, problem, peaks)
    assert entry["percent_of_peak"] == {"float32": 100.0, "sgemm": 100.0}
    entry["search"] = {"coarse_pass": "int16"}
    add_timing(entry, timing, problem, peaks)
    assert entry["percent_of_peak"] == {"float32": 100.0, "int16": 50.0, "sgemm": 100.0}
    peaks.rates["int8"] = [1e4, 1e4, 2e4]
    add_timing(entry, timing, problem, peaks)
    assert "int8" not in entry["percent_of_peak"]
    entry["search"] = {"coarse_pass": "int8"}  # as many numbers as int16 has, on tiles
    add_timing(entry, timing, problem, peaks)
    assert entry["percent_of_peak"] == {"float32": 100.0, "int16": 50.0, "int8": 10.0, "sgemm": 100.0}


def test_the_stand_in_for_cuvs_finds_the_nearest():
    if importlib.util.find_spec("triton") is None:
        skip_or_fail("triton", "triton is not installed")
    from vqkernels.benchmarks.triton_stand_in import nearest

    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(70, 40, generator=generator), torch.randn(150, 40, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # tests/conftest.py turns Triton's interpreter on
    codes = nearest(x.to(device), codebook.to(device), codebook.square().sum(dim=1).to(device) / 2)
    assert torch.equal(codes.cpu(), true_codes(x, codebook))


def test_shapes_by_number_and_by_name():
    assert parse_shape("4096,1024,256") == Shape(4096, 1024, 256)
    assert parse_shape("llamagen") == NAMED["llamagen"]
    for text in ("1,2", "0,1,2", "a,b,c", "vqgan"):
        with pytest.raises(ValueError, match="expected N,K,D"):
            parse_shape(text)

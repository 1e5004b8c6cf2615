"""``vqkernels bench``: who takes part, who is caught, what is reported."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from vqkernels.benchmarks import main as bench_main
from vqkernels.benchmarks import presets, search_providers
from vqkernels.benchmarks import providers as registry
from vqkernels.benchmarks.compare import compare_search
from vqkernels.benchmarks.config import OPERATIONS, BenchConfig
from vqkernels.benchmarks.data import KINDS
from vqkernels.benchmarks.gate import EmaGate, SearchGate, Verdict, check_rows, make_gate
from vqkernels.benchmarks.goals import Goal, goal_table, judge_goal
from vqkernels.benchmarks.machine import fixed_threads
from vqkernels.benchmarks.main import exit_code, run_bench
from vqkernels.benchmarks.memory import peak_memory
from vqkernels.benchmarks.peaks import SGEMM_SIZE
from vqkernels.benchmarks.presets import PRESETS, preset_configs
from vqkernels.benchmarks.problem import Problem, make_problem
from vqkernels.benchmarks.providers import Lookup, Provider, Unavailable, choose, providers_of
from vqkernels.benchmarks.report import STATES
from vqkernels.benchmarks.runner import Timing, measure, ratios
from vqkernels.benchmarks.shapes import Shape, parse_shape

from vqkernels import _extension
from vqkernels.cli.main import main
from vqkernels.kernels import compiled

TINY = "96,64,8"
COMPILED = _extension.cpu_library()  # None where the C++ kernels run
EVERYBODY = [pytest.param(op, p.name, id=f"{op}-{p.name}") for op in OPERATIONS for p in providers_of(op)]


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch):
    """The sgemm of a tiny benchmark may be tiny too, and its samples short."""
    assert SGEMM_SIZE >= 1024
    monkeypatch.setattr("vqkernels.benchmarks.peaks.SGEMM_SIZE", 128)
    monkeypatch.setattr("vqkernels.benchmarks.runner.MAX_CALLS", 20)


@pytest.fixture
def add_provider(monkeypatch):
    """Enter a provider for the length of one test."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE) if providers_of("search") else {})
    return registry.register


def quick(**changes) -> BenchConfig:
    settings = {"shape": [TINY], "seconds": 0.05, "check_rows": 50, "provider": ["torch-addmm"], "threads": [1]}
    return BenchConfig(**{**settings, **changes})


def run_quietly(config: BenchConfig) -> tuple[dict, str]:
    console = Console(file=io.StringIO(), width=80)
    document = run_bench(config, console)
    return document, console.file.getvalue()


def entry_of(document: dict, provider: str) -> dict:
    return next(e for e in document["cases"][0]["entries"] if e["provider"] == provider)


def zeros_search(problem: Problem):
    return lambda: torch.zeros(problem.shape.tokens, dtype=torch.int64)


@pytest.mark.parametrize(("operation", "name"), EVERYBODY)
def test_every_provider_is_right_or_says_why_it_cannot_run(operation, name):
    problem = make_problem(operation, parse_shape(TINY))
    (provider,) = choose(operation, [name])
    reason = provider.unavailable(problem)
    if reason is None:
        try:
            call = provider.prepare(problem)
            result = call()
        except Unavailable as error:
            reason = str(error)
    if reason is not None:
        assert len(reason) > 10
        assert name not in ("vqkernels-reference", "torch-addmm", "torch-index-add")
        return
    if result is None:
        assert provider.yardstick
        return
    verdict = make_gate(problem, 50).check(result, lowest_on_ties=provider.ours)
    assert verdict.checked >= 50
    assert verdict.wrong == 0 or "bf16" in name or provider.yardstick
    call()  # a second step goes on from the first


@pytest.mark.parametrize("gradient", ["rotation", "straight_through"])
def test_training_steps_of_all_providers_send_back_the_same_gradient(gradient, monkeypatch):
    problem = make_problem("train-step", parse_shape(TINY), gradient=gradient)
    seen = {}

    def recording_step(problem, forward, *, batched=False):
        x = (problem.x[None] if batched else problem.x).clone().requires_grad_()
        quantized, codes, loss = forward(x)
        torch.autograd.backward((quantized, loss), (problem.dquantized.view_as(x), torch.ones_like(loss)))
        seen[name] = x.grad.reshape(-1, problem.shape.dim)
        return lambda: codes.reshape(-1)

    monkeypatch.setattr("vqkernels.benchmarks.step_providers.training_step", recording_step)
    for name in ("vqkernels-reference", "vector-quantize-pytorch", "torch-index-add", "torch-one-hot"):
        (provider,) = choose(problem.operation, [name])
        if provider.package is None or provider.unavailable(problem) is None:
            provider.prepare(problem)()
    for name, dx in seen.items():
        torch.testing.assert_close(
            dx, seen["vqkernels-reference"], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_wrong_peer_is_caught_and_its_time_marked(add_provider):
    add_provider(Provider("zeros", "search", zeros_search))
    document, text = run_quietly(quick(provider=["zeros", "torch-addmm"]))
    zeros, addmm = entry_of(document, "zeros"), entry_of(document, "torch-addmm")
    assert (zeros["status"], addmm["status"]) == ("wrong", "measured")
    assert zeros["wrong"] > 25
    assert zeros["median_ms"] > 0
    assert addmm["wrong"] == 0
    assert f"! zeros: {zeros['wrong']} of 50 wrong" in text
    assert exit_code(document) == 0


def test_ours_with_one_wrong_code_gets_no_time(add_provider):
    def off_by_one(problem):
        (right,) = choose("search", ["vqkernels-reference"])
        codes = right.prepare(problem)()
        codes[0] = (codes[0] + 1) % problem.shape.codes
        return lambda: codes

    add_provider(Provider("broken", "search", off_by_one, ours=True))
    document, text = run_quietly(quick(provider=["broken", "torch-addmm"], baseline=["torch-addmm"]))
    entry = entry_of(document, "broken")
    assert (entry["status"], entry["wrong"], entry["median_ms"]) == ("refused", 1, None)
    assert entry["times_as_fast_as"] == {}
    assert "broken: refused: 1 of 50 wrong" in text
    assert exit_code(document) == 1


def test_an_error_of_a_peer_is_reported_and_one_of_ours_is_raised(add_provider):
    def explode(_problem):
        raise RuntimeError("no such luck\nsecond line")

    add_provider(Provider("peer", "search", explode))
    document, text = run_quietly(quick(provider=["peer", "torch-addmm"]))
    assert entry_of(document, "peer")["reason"] == "RuntimeError: no such luck"
    assert "peer: failed" in text
    add_provider(Provider("mine", "search", explode, ours=True))
    with pytest.raises(RuntimeError, match="no such luck"):
        run_quietly(quick(provider=["mine"]))


def test_ties_are_right_for_peers_but_ours_must_take_the_lowest():
    single = make_problem("search", Shape(20, 16, 4))
    doubled = torch.cat([single.codebook, single.codebook])
    gate = SearchGate(Problem("search", Shape(20, 32, 4), single.x, doubled), 20)
    assert gate.check(gate.codes + 16, lowest_on_ties=False).wrong == 0
    assert gate.check(gate.codes + 16, lowest_on_ties=True).wrong == 20
    assert gate.check(gate.codes, lowest_on_ties=True).wrong == 0
    assert gate.check(torch.full((20,), -1), lowest_on_ties=False).wrong == 20
    assert gate.check(torch.full((20,), 32), lowest_on_ties=False).wrong == 20


def test_a_code_farther_by_less_than_float64_sees_is_wrong():
    x = torch.tensor([[2.0**30, 0.0]])
    codebook = torch.tensor([[0.0, 0.0], [0.0, 2.0**-10]])  # squared distances 2^60 and 2^60 + 2^-20
    gate = SearchGate(Problem("search", Shape(1, 2, 2), x, codebook), 1)
    assert gate.check(torch.tensor([1]), lowest_on_ties=False).wrong == 1


def test_quantize_gate_sees_a_wrong_row_under_a_right_code():
    problem = make_problem("quantize", Shape(60, 16, 4))
    gate = make_gate(problem, 60)
    lookup = Lookup(problem.codebook[gate.codes], gate.codes, torch.zeros(60))
    assert gate.check(lookup, lowest_on_ties=True).wrong == 0
    lookup.quantized[7, 2] += 1e-6
    lookup.codes[9] = (lookup.codes[9] + 1) % 16
    assert gate.check(lookup, lowest_on_ties=False).wrong == 2


@pytest.mark.parametrize("data", KINDS)
def test_ours_is_right_on_every_distribution(data):
    names = ["vqkernels-reference", *(["vqkernels-compiled"] if COMPILED is None else [])]
    document, _ = run_quietly(quick(data=data, shape=["100,72,5"], provider=names, check_rows=100, seconds=0.01))
    for name in names:
        assert (entry_of(document, name)["status"], entry_of(document, name)["wrong"]) == ("measured", 0)


def test_the_gate_sees_a_loss_and_gradients_that_are_off():
    problem = make_problem("entropy", Shape(40, 64, 6), data="signs")
    gate = make_gate(problem, 50)
    for provider in choose("entropy", ["vqkernels-reference", "vqkernels-signs", "torch-plain"]):
        result = provider.prepare(problem)()
        rows = 41 if result.dcodebook is None else 41 + 64
        assert gate.check(result, lowest_on_ties=provider.ours) == Verdict(rows, 0)
        assert gate.check(result._replace(loss=result.loss * 1.0001), lowest_on_ties=True).wrong == 1
        result.dx[3] *= 1.01
        assert gate.check(result, lowest_on_ties=True).wrong == 40
        assert gate.check(result._replace(dx=result.dx * torch.nan), lowest_on_ties=False).wrong == 40


def test_a_changing_codebook_is_written_to_before_every_call(add_provider):
    seen = []

    def watch(problem):
        def run():
            seen.append((problem.codebook[0, 0].item(), problem.codebook._version))
            return torch.cdist(problem.x, problem.codebook).argmin(dim=1)

        return run

    add_provider(Provider("watch", "search", watch))
    run_quietly(quick(provider=["watch"], codebook="changing"))
    values, versions = zip(*seen[1:], strict=True)  # the first call is the gate's
    assert len(set(versions)) == len(versions) > 5
    assert all(a < b for a, b in pairwise(values))
    seen.clear()
    run_quietly(quick(provider=["watch"]))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_everybody_sees_a_codebook_that_changed_since_the_last_call(operation):
    problem = make_problem(operation, parse_shape(TINY), changing=True)
    for provider in choose(operation, [], "cpu"):
        if provider.name != "vqkernels-triton" and provider.unavailable(problem) is None:
            call = provider.prepare(problem)
            call()
            problem.codebook[:] = problem.codebook.roll(1, dims=0)
            verdict = make_gate(problem, 96).check(call(), lowest_on_ties=provider.ours)
            assert verdict.wrong == 0 or "bf16" in provider.name, provider.name


def test_switches_hold_for_the_call_alone(monkeypatch):
    seen = []

    def record(*_, precision):
        seen.append(os.environ.get("VQKERNELS_CPU_ISA"))
        return (precision,)

    monkeypatch.setattr(search_providers, "nearest", record)
    monkeypatch.setenv("VQKERNELS_CPU_ISA", "avx512")
    search_providers.search_with("reference", _two_by_two(), switches={"VQKERNELS_CPU_ISA": "avx2"})()
    assert (seen, os.environ["VQKERNELS_CPU_ISA"]) == (["avx2"], "avx512")
    monkeypatch.delenv("VQKERNELS_CPU_ISA")
    search_providers.search_with("reference", _two_by_two(), switches={"VQKERNELS_CPU_ISA": "portable"})()
    assert "VQKERNELS_CPU_ISA" not in os.environ


def _two_by_two() -> Problem:
    return make_problem("search", Shape(2, 2, 2))


def test_ema_gate_sees_one_wrong_row():
    problem = make_problem("ema", Shape(500, 40, 8))
    gate = EmaGate(problem)
    (ours,) = choose("ema", ["vqkernels-reference"])
    codebook = ours.prepare(problem)().clone()
    assert gate.check(codebook, lowest_on_ties=True).wrong == 0
    codebook[7, 3] *= 1 + 1e-4
    assert gate.check(codebook, lowest_on_ties=True).wrong == 1


def test_bf16_autocast_is_reported_with_its_error_rate():
    document, _ = run_quietly(quick(provider=["torch-expanded-bf16"], data="offset"))
    entry = entry_of(document, "torch-expanded-bf16")
    assert entry["status"] == "wrong"
    assert entry["wrong"] / entry["checked"] > 0.1


def test_checked_rows_are_bounded_and_reach_both_ends():
    rows = check_rows(1_000_003, 100)
    assert len(rows) == 100
    assert (rows[0], rows[-1]) == (0, 1_000_002)
    assert check_rows(5, 100).tolist() == [0, 1, 2, 3, 4]


ENTRY_KEYS = {
    *("provider", "ours", "yardstick", "note", "search", "status", "reason", "checked", "wrong"),
    *("median_ms", "p25_ms", "p75_ms", "min_ms", "rounds", "calls_per_round", "times_as_fast_as"),
    "inertia",
    *("gflops", "percent_of_peak", "gbytes_per_second", "peak_extra_bytes", "peak_extra_method"),
}
CASE_KEYS = {
    *("operation", "shape", "threads", "device", "dtype", "data", "codebook", "gradient", "seed", "flops"),
    *("flops_formula", "bytes", "bytes_formula", "peak_gflops", "baselines", "entries"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_json_holds_machine_versions_formulas_and_every_number(operation, tmp_path):
    path = tmp_path / "deep" / "result.json"
    slow = ("torch-compile", "vqkernels-triton")  # compiled, interpreted: once each above is enough
    names = [p.name for p in choose(operation, [], "cpu") if p.name not in slow]
    run_quietly(quick(operation=operation, provider=names, json=str(path)))
    document = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert set(document) == {"schema", "date", "commit", "machine", "versions", "configs", "cases", "goals"}
    assert {"cpu", "isa", "cores", "memory_bytes", "torch_cpu_capability", "gpu"} <= set(document["machine"])
    assert document["versions"]["torch"] == torch.__version__
    (case,) = document["cases"]
    assert set(case) == CASE_KEYS
    assert case["shape"] == {"name": None, "N": 96, "K": 64, "D": 8}
    searches = {"ema": 0, "kmeans": 3, "entropy": 3}.get(operation, 1)
    assert case["flops"] == (searches * 2 * 96 * 64 * 8 or None)
    assert [entry["provider"] for entry in case["entries"]] == names
    for entry in case["entries"]:
        assert set(entry) == ENTRY_KEYS
        assert entry["status"] in STATES
        assert (entry["status"] in ("measured", "wrong")) == (entry["median_ms"] is not None)
        assert entry["status"] == "measured" or entry["reason"]
    assert list(path.parent.iterdir()) == [path]


def test_a_yardstick_of_ours_may_be_wrong_and_one_without_codes_is_timed(add_provider):
    add_provider(Provider("fast", "search", zeros_search, ours=True, yardstick=True))
    add_provider(Provider("product", "search", lambda problem: lambda: None, yardstick=True))
    document, text = run_quietly(quick(provider=["fast", "product", "torch-addmm"], baseline=["fast"]))
    fast, product = entry_of(document, "fast"), entry_of(document, "product")
    assert (fast["status"], product["status"], product["checked"]) == ("wrong", "measured", None)
    assert min(fast["median_ms"], product["median_ms"]) > 0
    assert "fast" in entry_of(document, "torch-addmm")["times_as_fast_as"]
    assert "! fast: " in text
    assert exit_code(document) == 0


def test_the_peaks_are_measured_in_every_round(monkeypatch):
    monkeypatch.setattr(_extension, "cpu_library", lambda: None)
    monkeypatch.setattr(compiled, "peak_rates", lambda threads: {"int16": 2e9 * threads, "float32": 0.0})
    document, text = run_quietly(quick(threads=[1]))
    assert document["cases"][0]["peak_gflops"]["int16"] == 2.0
    assert set(document["cases"][0]["peak_gflops"]) == {"int16", "sgemm"}
    assert "int16 2, sgemm" in text
    assert "2*N*K*D" in text


def test_losses_to_the_baseline_are_printed():
    document, text = run_quietly(quick(provider=["vqkernels-reference", "torch-addmm"]))
    ours = entry_of(document, "vqkernels-reference")
    assert document["cases"][0]["baselines"] == ["torch-addmm"]
    assert f"{ours['times_as_fast_as']['torch-addmm']['median']:.2f}" in text


def test_interleaved_ratios_are_taken_round_by_round():
    timings = measure({"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, seconds=0.0, min_rounds=4)
    assert len(timings["slow"].samples) == len(timings["fast"].samples) == 4
    assert timings["slow"].median > timings["fast"].median
    assert ratios(Timing([4.0, 9.0], 1), Timing([2.0, 3.0], 1)) == [2.0, 3.0]


def test_threads_are_fixed_and_given_back():
    before = torch.get_num_threads()
    document, _ = run_quietly(quick(threads=[1, 2]))
    assert [case["threads"] for case in document["cases"]] == [1, 2]
    assert torch.get_num_threads() == before


def test_peak_memory_finds_the_matrix_that_the_reference_does_not_build():
    problem = make_problem("search", Shape(4096, 4096, 4))
    peaks = peak_memory(["torch-cdist", "vqkernels-reference"], problem, threads=1)
    matrix = 4 * 4096 * 4096
    assert matrix <= peaks["torch-cdist"].bytes < 3 * matrix
    assert peaks["vqkernels-reference"].bytes < matrix


def test_a_provider_that_would_not_fit_in_memory_says_so():
    far_too_large = make_problem("search", parse_shape(TINY))
    object.__setattr__(far_too_large, "shape", Shape(10**9, 10**6, 8))
    (cdist,) = choose("search", ["torch-cdist"])
    assert "GB for its N x K intermediates" in (cdist.unavailable(far_too_large) or "")


def test_compare_search_puts_ours_first_and_counts_wrong_codes():
    x, codebook = torch.randn(8, 25, 16) * 0.1 + 1, torch.randn(300, 16) * 0.1 + 1
    with fixed_threads(1):
        rows = compare_search(x, codebook, seconds=0.1, check_rows=200)
    assert rows[0].name == "vqkernels.nearest"
    assert len(rows) == 4
    assert (rows[0].wrong, rows[0].times_slower) == (0, 1.0)
    assert rows[-1].wrong > 0
    assert all(row.checked == 200 and row.milliseconds > 0 and row.peak_extra_bytes is not None for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "sort"}, "operation: expected one of search"),
        ({"dtype": "int8"}, "dtype: expected"),
        ({"seconds": 0}, "seconds: expected a positive"),
        ({"threads": [0]}, "threads: expected positive"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        ({"data": "uniform"}, "data: expected one of normal, kmeans"),
        ({"operation": "ema", "codebook": "changing"}, "codebook: expected fixed for ema"),
        ({"provider": ["nobody"]}, "provider: expected one of vqkernels-compiled"),
        ({"baseline": ["faiss"]}, "baseline: expected one of the providers torch-addmm"),
        ({"preset": "all"}, "preset: expected one of cpu"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(quick(**changes))


def test_command_line(tmp_path, capsys):
    path = tmp_path / "r.json"
    words = (
        f"bench search --shape 40,30,4 --shape 20,10,2 --threads 1 --provider torch-addmm --seconds 0.05 --json {path}"
    )
    assert main(words.split()) == 0
    assert [case["shape"]["N"] for case in json.loads(path.read_text())["cases"]] == [40, 20]
    assert main(["bench", "search", "--shape", "1,2"]) == 2
    assert "shape: expected N,K,D" in capsys.readouterr().err


def test_the_module_is_another_name_of_the_command(tmp_path):
    path = tmp_path / "r.json"
    words = ["search", "--shape", "9,7,3", "--threads", "1", "--provider", "torch-cdist", "--seconds", "0.01", "--json"]
    command = [sys.executable, "-m", "vqkernels.benchmarks"]
    done = subprocess.run([*command, *words, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["cases"][0]["shape"] == {"name": None, "N": 9, "K": 7, "D": 3}
    done = subprocess.run([*command, "sort"], capture_output=True, text=True, check=False)
    assert (done.returncode, "must be one of search" in done.stderr) == (2, True)


def test_every_option_has_a_help_text_and_none_needs_torch(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("shape", "threads", "provider", "json", "data", "codebook", "preset"))
    code = "import sys, vqkernels.benchmarks.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_presets_speak_of_what_they_measure():
    for name, preset in PRESETS.items():
        for config in preset_configs(name, BenchConfig(threads=[1])):
            assert config.threads == [1]
            bench_main._check_config(replace(config, device="cpu", threads=[]))
        for goal in preset.goals:
            same = [c for c in preset.configs if (c.operation, c.codebook) == (goal.operation, goal.codebook)]
            able = [c for c in same if goal.shape in c.shape and goal.provider in c.provider]
            assert able, goal
            assert goal.baseline is None or any(goal.baseline in (c.baseline or ["faiss"]) for c in able), goal


def test_the_cpu_preset_asks_for_what_was_promised():
    cpu = PRESETS["cpu"]
    assert presets.TIMES_FAISS["512,262144,18"] == 3.8
    for shape in presets.TIMES_FAISS:
        same = [c for c in cpu.configs if c.operation == "search" and shape in c.shape and "faiss" in c.provider]
        assert {(c.data, c.codebook) for c in same} >= {
            ("normal", "fixed"),
            ("kmeans", "fixed"),
            ("normal", "changing"),
        }
        assert all(c.threads == [1, 2] for c in same)
    assert sum(c.seconds * len(c.shape) * len(c.threads) for c in cpu.configs if c.measure != "memory") < 600


def test_goals_are_met_missed_or_missed_for_want_of_a_number():
    document, _ = run_quietly(quick(provider=["vqkernels-reference", "torch-addmm"], baseline=["torch-addmm"]))
    ask = {"operation": "search", "shape": TINY, "provider": "vqkernels-reference"}
    (won,) = judge_goal(Goal(**ask, baseline="torch-addmm", at_least=1e-9), document["cases"])
    (lost,) = judge_goal(Goal(**ask, baseline="torch-addmm", at_least=1e9), document["cases"])
    (unknown,) = judge_goal(Goal(**ask, max_bytes=10**9), document["cases"])
    limits = [judge_goal(Goal(**ask, max_ms=limit), document["cases"])[0]["met"] for limit in (1e6, 1e-6)]
    assert limits == [True, False]
    assert len(goal_table([won, lost, unknown]).rows) == 3
    assert (won["met"], lost["met"], unknown["met"]) == (True, False, False)
    assert judge_goal(Goal(**ask, data="kmeans", max_bytes=1), document["cases"]) == []
    document["cases"][0]["entries"][0]["percent_of_peak"] = {"int16": 85.5}
    percents = [judge_goal(Goal(**ask, percent_of="int16", at_least=p), document["cases"])[0] for p in (85, 86)]
    assert [verdict["met"] for verdict in percents] == [True, False]
    document["goals"] = [lost]
    assert exit_code(document) == 1

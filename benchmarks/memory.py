"""Peak extra memory of one call: what it holds at its worst beyond its inputs, its outputs and gradients included.

On CPU a fresh process runs the call once at a tiny size (libraries make their buffers), then at the full size, and the
high-water mark of its resident memory is compared with what was resident before. On CUDA the allocator counts.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .machine import fixed_threads
from .problem import TRIAL_SHAPE, Problem, trial_problem
from .providers import Provider, choose

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"  # proc(5), clear_refs
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Peak:
    """Peak extra memory of one call, or why there is no number."""

    bytes: int | None
    method: str  # "VmHWM" | "ru_maxrss" | "cuda allocator", or the reason


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """Hand the heap's free pages back, so that what is used again shows as new."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_here(call: Any) -> Peak:
    """Peak extra resident memory of ``call()`` in this process; meaningful in a fresh one."""
    _return_freed_memory()
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER)
        before = _status("VmRSS")
    except OSError:  # no /proc, or not writable: the mark can only rise, so what came before must have been lower
        before = _max_rss()
        call()
        return Peak(_max_rss() - before, "ru_maxrss")
    kept = call()  # outputs count, so they must outlive the reading
    peak = Peak(max(0, _status("VmHWM") - before), "VmHWM")
    del kept
    return peak


def _measure_on_cuda(provider: Provider, problem: Problem) -> Peak:
    provider.prepare(problem)()  # kernels are compiled and loaded
    call = provider.prepare(problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Peak(torch.cuda.max_memory_allocated() - before, "cuda allocator")


def _in_child(spec: dict[str, Any]) -> dict[str, Any]:
    """The last line of a fresh process that ran this module on ``spec``."""
    command = [sys.executable, "-m", "vqkernels.benchmarks.memory"]
    text = json.dumps(spec)
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT_SECONDS} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"the measuring process ended with {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory(names: list[str], problem: Problem, *, threads: int | None = None) -> dict[str, Peak]:
    """Peak extra memory of one call of each provider, one after the other in one fresh process (CPU).

    Args:
        names: providers of the problem's operation; those that are unavailable answer with their reason.
    """
    providers = choose(problem.operation, names)
    refused = {p.name: p.unavailable(problem) for p in providers}
    peaks = {name: Peak(None, reason) for name, reason in refused.items() if reason is not None}
    able = [p for p in providers if refused[p.name] is None]
    if problem.x.is_cuda:
        return peaks | {p.name: _measure_on_cuda(p, problem) for p in able}
    if not able:
        return peaks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save({"x": problem.x, "codebook": problem.codebook, "codes": problem.codes}, path)
        spec = {
            "providers": [p.name for p in able],
            "inputs": str(path),
            "operation": problem.operation,
            "gradient": problem.gradient,
            "changing": problem.changing,
            "iterations": problem.iterations,
            "threads": threads or torch.get_num_threads(),
        }
        answer = _in_child(spec)
    if "error" in answer:
        return peaks | {p.name: Peak(None, answer["error"]) for p in able}
    return peaks | {name: Peak(**entry) for name, entry in answer.items()}


def _load_problem(spec: dict[str, Any]) -> tuple[Problem, Problem]:
    """The problem at full size and at a tiny one."""
    inputs = torch.load(spec["inputs"])
    x, codebook = inputs["x"], inputs["codebook"]
    dtype = str(x.dtype).removeprefix("torch.")
    tiny = trial_problem(spec["operation"], dtype=dtype, gradient=spec["gradient"])
    shape = replace(TRIAL_SHAPE, tokens=x.shape[0], codes=codebook.shape[0], dim=x.shape[1])
    dquantized = torch.randn_like(x) if spec["operation"] == "train-step" else None
    rest = (dquantized, inputs["codes"], spec["gradient"], spec["changing"], spec["iterations"])
    return Problem(spec["operation"], shape, x, codebook, *rest), tiny


def _child() -> None:
    spec = json.loads(sys.stdin.read())
    answer = {}
    problem, tiny = _load_problem(spec)
    for provider in choose(spec["operation"], spec["providers"]):
        with fixed_threads(spec["threads"]):
            provider.prepare(tiny)()
            call = provider.prepare(problem)
            peak = measure_here(call)
            del call
        answer[provider.name] = {"bytes": peak.bytes, "method": peak.method}
    print(json.dumps(answer))


if __name__ == "__main__":
    _child()

"""`vqkernels bench`: the benchmarks of vqkernels.benchmarks."""

from __future__ import annotations

from vqkernels.benchmarks.config import BenchConfig
from vqkernels.benchmarks.main import exit_code, run_bench

from .terminal import make_console


def run(config: BenchConfig) -> int:
    """Runs the benchmark; 1 where one of ours returned a wrong code or a goal was missed."""
    return exit_code(run_bench(config, make_console()))

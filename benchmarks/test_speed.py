"""The registry under pytest-benchmark: ``pytest benchmarks --benchmark-enable``. Nothing asserts a time.

Without --benchmark-enable every provider runs once, as a check that it works.
"""

from __future__ import annotations

import pytest
from vqkernels.benchmarks.config import OPERATIONS
from vqkernels.benchmarks.gate import make_gate
from vqkernels.benchmarks.problem import make_problem
from vqkernels.benchmarks.providers import Unavailable, providers_of
from vqkernels.benchmarks.shapes import parse_shape

SHAPES = ("1024,1024,256", "1024,4096,8", "256,16384,18")
CASES = [
    pytest.param(provider, shape, id=f"{operation}-{provider.name}-{shape}")
    for operation in OPERATIONS
    for provider in providers_of(operation)
    for shape in SHAPES
]


@pytest.mark.parametrize(("provider", "shape"), CASES)
def test_speed(benchmark, provider, shape) -> None:
    """Times one provider; ours must be right first."""
    problem = make_problem(provider.operation, parse_shape(shape))
    reason = provider.unavailable(problem)
    if reason is not None:
        pytest.skip(reason)
    try:
        call = provider.prepare(problem)
    except Unavailable as error:
        pytest.skip(str(error))
    result = call()
    if result is not None:
        verdict = make_gate(problem, 256).check(result, lowest_on_ties=provider.ours)
        assert verdict.wrong == 0 or not provider.ours or provider.yardstick
        benchmark.extra_info["wrong"] = f"{verdict.wrong}/{verdict.checked}"
    benchmark.group = f"{provider.operation} {shape}"
    benchmark(call)

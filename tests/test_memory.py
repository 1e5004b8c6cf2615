"""A training step at 131072 tokens and 16384 codes in under 64 MB: an N x K array would take 8 GB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from requirements import skip_or_fail

from vqkernels.backends import candidates

BUDGET_MB = 64
# peak RSS from the kernel, set back to the present before the step; on Linux alone
STEP = """
import re, sys, torch
from vqkernels import VectorQuantizer

def status_mb(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

options = eval(sys.argv[1])
first = options.get("channels") == "first"
module = VectorQuantizer(8, 16384, **options)

def step(x):
    quantized, _, loss = module(x)
    (quantized.square().mean() + loss).backward()

step(torch.randn((1, 8, 8, 8) if first else (1, 64, 8), requires_grad=True))  # thread pools, code pages
x = torch.randn((32, 8, 64, 64) if first else (32, 4096, 8), requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")
before = status_mb("VmRSS")
step(x)
print(status_mb("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "options",
    [{}, {"dead_code_threshold": 0.5, "gradient": "rotation", "channels": "first"}, {"metric": "cosine"}],
    ids=["plain", "revival-rotation-map", "cosine"],
)
def test_a_large_training_step_stays_within_budget(options: dict):
    """Extra over the input: quantized, codes, gradients and scratch."""
    probe = torch.zeros(1, 1, 8)
    reason = next(
        c.reason for c in candidates("nearest", probe, probe[0], "euclidean", "exact") if c.backend == "compiled"
    )
    if reason is not None:
        skip_or_fail("compiled", f"too slow without the compiled backend: {reason}")
    result = subprocess.run(
        [sys.executable, "-c", STEP, repr(options)],
        env={**os.environ, "VQKERNELS_BACKEND": "compiled", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < BUDGET_MB

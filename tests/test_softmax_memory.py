"""Losses over all codes without an N x K array: 2048 tokens and 65536 codes would take 512 MB for each one."""

from __future__ import annotations

import json
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
import ctypes, json, re, torch
import vqkernels as vq

def status_mb(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

LOSSES = {
    "entropy": lambda x, c: vq.entropy_loss(x, c).loss,
    "cosine": lambda x, c: vq.entropy_loss(x, c, metric="cosine").loss,
    "cross-entropy": lambda x, c: vq.code_cross_entropy(x, c, torch.arange(len(x))),
    "index-propagation": lambda x, c: vq.index_propagation(x, c).quantized.square().mean(),
    "sampling": lambda x, c: vq.lookup(vq.sample_codes(x, c), c).sum(),
    "signs": lambda x, c: vq.sign_entropy_loss(x.repeat(1, 2)).loss,
}

def leaves(n, k):
    return torch.randn(n, 8, requires_grad=True), torch.randn(k, 8, requires_grad=True)

def peak(loss):
    loss(*leaves(16, 16)).backward()  # thread pools, code pages
    x, codebook = leaves(2048, 65536)
    ctypes.CDLL(None).malloc_trim(0)  # what the last one freed would not be counted
    open("/proc/self/clear_refs", "w").write("5")
    before = status_mb("VmRSS")
    loss(x, codebook).backward()
    return status_mb("VmHWM") - before

print(json.dumps({name: peak(loss) for name, loss in LOSSES.items()}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_losses_over_all_codes_stay_within_budget():
    """Forward and backward; gradients, packed codes and scratch are counted."""
    probe = torch.zeros(1, 1, 8)
    listed = candidates("softmax_forward", probe, probe[0], None, 1.0)
    reason = next(c.reason for c in listed if c.backend == "compiled")
    if reason is not None:
        skip_or_fail("compiled", f"too slow without the compiled backend: {reason}")
    result = subprocess.run(
        [sys.executable, "-c", STEP],
        env={**os.environ, "VQKERNELS_BACKEND": "compiled", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peaks = json.loads(result.stdout)
    assert len(peaks) == 6
    assert all(peak < BUDGET_MB for peak in peaks.values()), peaks

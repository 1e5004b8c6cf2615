"""Every test that takes ``backend`` runs on each backend and device that this machine has."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter

# Each of xdist's processes gets its share of the cores: more threads than cores wait for each other. Read where torch
# is imported; not set in the process that starts the others, which would hand its own number on.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import torch

HAS_CUDA = torch.cuda.is_available()
THREADS = torch.get_num_threads()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest  # noqa: E402
from quick_interpreter import make_quick  # noqa: E402
from requirements import skip_or_fail  # noqa: E402

import vqkernels as vq  # noqa: E402
from vqkernels.backends import candidates  # noqa: E402

# first, the longest before the others: a long file that comes last keeps one process busy while the others are done
LONG_FILES = (
    *("test_triton_compile.py", "test_cuda_compile.py", "test_training_vqgan.py", "test_packaging.py"),
    *("test_nearest_k.py", "test_nearest.py", "test_cuda_device_code.py", "test_compile.py", "test_export.py"),
    *("test_cuda_hopper.py", "test_triton_kernels.py", "test_training.py", "test_distributed.py", "test_benchmarks.py"),
    *("test_prepared.py", "test_triton_nearest_k.py", "test_profile_softmax.py", "test_profile.py", "test_cli.py"),
    *("test_demo.py", "test_memory.py", "test_softmax_memory.py", "test_compat_distributed.py"),
)

if not HAS_CUDA and importlib.util.find_spec("triton") is not None:
    make_quick()

RUNS = [
    ("reference", "cpu"),
    ("compiled", "cpu"),
    ("triton", "cuda" if HAS_CUDA else "cpu"),
    ("compiled", "cuda"),
]


def pytest_configure(config: pytest.Config) -> None:
    """The order below is also that of xdist, which would begin with the files of the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONG_FILES, then the files of the most tests."""
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -tests[item.path], str(item.path)))


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def backend(request: pytest.FixtureRequest):
    """Puts one backend in force and gives its (name, device)."""
    name, device = request.param
    if device == "cuda" and not HAS_CUDA:
        skip_or_fail("cuda", "no CUDA device")
    probe = torch.zeros(1, 1, 1, device=device)
    reason = {c.backend: c.reason for c in candidates("nearest", probe, probe[0], "euclidean", "exact")}[name]
    if reason is not None:
        skip_or_fail("cuda" if device == "cuda" else name, f"{name} on {device}: {reason}")
    with vq.use_backend(name):
        yield name, device


@pytest.fixture(autouse=True)
def _quiet_threads():
    """No test sees the thread count of another, nor of a module's fixtures."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """A training run draws its curves for seconds; the tests that look at them are marked ``curves``."""
    log = sys.modules.get("vqkernels.models.run_log")
    if log is not None and request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(log.RunLog, "draw_curves", lambda self: None)

"""The compiled library: found, built once, kept, and done without where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from requirements import skip_or_fail

import vqkernels as vq
from vqkernels import _extension

SEARCH = """
import warnings, torch
import vqkernels as vq
from vqkernels import _extension
warnings.simplefilter("always")
reason = _extension.cpu_library()
codebook = torch.randn(9, 4)
for _ in range(2):
    assert vq.nearest(codebook, codebook)[0].tolist() == list(range(9))
print(repr(reason))
"""


def _run(**variables: str) -> subprocess.CompletedProcess[str]:
    drop = ("CXX", "VQKERNELS_BACKEND", "VQKERNELS_DISABLE_COMPILED", "VQKERNELS_CPU_ISA")
    env = {key: value for key, value in os.environ.items() if key not in drop} | variables
    command = [sys.executable, "-c", SEARCH]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not looked for its libraries yet, with an empty cache."""
    monkeypatch.setattr(_extension, "_results", {})
    monkeypatch.setattr(_extension, "_prebuilt", lambda: None)
    monkeypatch.setenv("VQKERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("VQKERNELS_DISABLE_COMPILED", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def _fake(content: str = "library"):
    """A stand-in for the compiler that notes every call."""
    calls = []

    def compile_into(library: str, folder: Path) -> Path:
        calls.append(folder)
        product = folder / f"{library}.so"
        product.write_text(content)
        return product

    return compile_into, calls


def test_without_a_compiler_the_package_works_and_says_so_once(tmp_path: Path):
    done = _run(PATH=str(tmp_path), VQKERNELS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout
    assert done.stderr.count("no C++ compiler") == 1, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_in_the_cache_needs_no_compiler(tmp_path: Path):
    if _extension.cpu_library() is not None:
        skip_or_fail("compiled", str(_extension.cpu_library()))
    if _extension._prebuilt() is not None:
        pytest.skip("the library is part of this installation")
    done = _run(PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"  # no reason against it, though nothing could have been compiled


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VQKERNELS_DISABLE_COMPILED", "1")
    assert _extension.cpu_library() == "VQKERNELS_DISABLE_COMPILED is set"
    assert _extension.cuda_library() == "VQKERNELS_DISABLE_COMPILED is set"
    x = torch.randn(3, 4)
    assert "compiled   no: VQKERNELS_DISABLE_COMPILED is set" in vq.explain("nearest", x[None], x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vq.nearest(x, x)[0].tolist() == [0, 1, 2]
    with pytest.raises(vq.BackendError, match="VQKERNELS_DISABLE_COMPILED"), vq.use_backend("compiled"):
        vq.nearest(x, x)


def test_a_failing_build_keeps_the_compilers_words_and_warns_once(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    broken = fresh / "broken-c++"
    complaint = "registration.cpp:1:1: fatal error: no such thing"
    broken.write_text(f"#!/bin/sh\n[ $# -lt 3 ] && exec c++ \"$@\"\necho '{complaint}' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(RuntimeWarning, match="cpu kernels are not available") as caught:
        reason = _extension.cpu_library()
    assert "fatal error: no such thing" in reason
    assert _extension.cpu_library() == reason
    assert len([w for w in caught if "vqkernels" in str(w.message)]) == 1
    assert not list(fresh.glob("cpu-*/*"))  # nothing half-made stays
    with pytest.raises(RuntimeError, match="no such thing"):
        _extension.library_path()


def test_a_cache_that_cannot_be_written_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("VQKERNELS_CACHE", str(fresh / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="not available"):
        assert "file" in _extension.cpu_library()


def test_one_key_is_built_once(fresh: Path):
    compile_into, calls = _fake()
    first = _extension._find_or_build("cpu", "key", compile_into)
    again = _extension._find_or_build("cpu", "key", compile_into)
    assert first[1]
    assert not again[1]
    assert first[0] == again[0]
    assert first[0].read_text() == "library"
    assert len(calls) == 1
    assert [path.name for path in first[0].parent.iterdir()] == [first[0].name]  # no scratch folder stays
    _extension._find_or_build("cpu", "other", compile_into)
    assert len(calls) == 2


def test_processes_that_build_at_once_share_one_build(fresh: Path):
    code = """
import sys, time
from pathlib import Path
from vqkernels import _extension
def compile_into(library, folder):
    time.sleep(0.5)
    (folder / "x.so").write_text("library")
    return folder / "x.so"
print(_extension._find_or_build("cpu", "key", compile_into)[1])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    built = [process.communicate()[0].strip() for process in processes]
    assert sorted(built) == ["False", "False", "True"]


def test_the_key_names_what_goes_into_the_library(monkeypatch: pytest.MonkeyPatch):
    def key(flags: tuple[str, ...] = ("-O3",), architecture: str = "x86_64") -> str:
        return _extension._key("cpu", list(flags), architecture)

    base = key()
    assert base == key()
    others = {key(flags=("-O2",)), key(architecture="aarch64")}
    monkeypatch.setenv("CXX", "clang++")
    others.add(key())
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    others.add(key())
    assert base not in others
    assert len(others) == 4


def test_the_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cpu").mkdir()
    for name in ("registration.cpp", "exact.h", "cpu/a.cpp"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(_extension, "source_root", lambda: tmp_path)
    keys = set()
    for name in ("registration.cpp", "exact.h", "cpu/a.cpp"):
        keys.add(_extension._key("cpu", [], ""))
        (tmp_path / name).write_text("changed")
    keys.add(_extension._key("cpu", [], ""))
    assert len(keys) == 4


def test_reports_for_the_command_line():
    (report, *_) = _extension.build(cuda=False)
    assert report.name == "cpu"
    assert (report.path is None) == (report.reason is not None)
    lines = _extension.describe()
    assert {"compiled cpu", "compiled cuda", "cache", "instruction set"} <= set(lines)
    assert all(isinstance(line, str) for line in lines.values())


def test_asking_for_cuda_where_there_is_none_gives_the_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert _extension.cuda_library() == "torch sees no CUDA device"
    assert [report.name for report in _extension.build(cuda=True)] == ["cpu", "cuda"]


def test_the_file_can_be_run_by_setup_py_without_the_package():
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_extension", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
assert "torch" not in sys.modules
print(*extension.cpu_sources(root="csrc"), *extension.CPU_FLAGS)
"""
    command = [sys.executable, "-c", code, str(Path(_extension.__file__))]
    root = _extension.source_root().parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.startswith("csrc/registration.cpp csrc/cpu/")
    assert "-DVQKERNELS_PYTHON_MODULE" in done.stdout

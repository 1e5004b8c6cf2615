"""What a user installs: a wheel with the sources inside, working anywhere, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import skip_or_fail

import vqkernels as vq
from vqkernels import _extension

ROOT = Path(__file__).parent.parent
ROUND_TRIP = """
import torch, vqkernels as vq
from vqkernels.models import VQVAE, VQVAEConfig, load_preset
from pathlib import Path
assert Path(vq.__file__).is_relative_to({target!r}), vq.__file__
codebook = torch.randn(50, 8)
codes, distance = vq.nearest(codebook.flip(0), codebook)
assert codes.tolist() == list(range(49, -1, -1)) and not distance.any()
model = VQVAE(VQVAEConfig()).eval()
images = torch.rand(1, 3, 8 * model.factor, 8 * model.factor) * 2 - 1
assert model.decode(model.encode(images)).shape == images.shape
assert load_preset("f16-1024").model.factor == 16
print(vq.explain("nearest", codebook, codebook))
"""


SOURCES = (
    "vqkernels",
    "csrc",
    "models",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def _install(folder: Path, **variables: str) -> tuple[Path, Path]:
    """Build a wheel from a copy of the sources and install it into ``folder``/site: (wheel, site)."""
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyc"))
        else:
            shutil.copy(source, target)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=folder / "source", env={**os.environ, **variables}, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return wheel, folder / "site"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed."""
    wheel, site = _install(tmp_path_factory.mktemp("wheel"))
    assert wheel.name.endswith("py3-none-any.whl")
    return site


@pytest.fixture(scope="module")
def cache() -> Path:
    """Where the checkout keeps its compiled library. Its name is a digest of the sources, so that an installed package
    finds it there if, and only if, it holds the same ones."""
    if (reason := _extension.cpu_library()) is not None:
        skip_or_fail("compiled", reason)
    if _extension._prebuilt() is not None:
        pytest.skip("the library is part of this installation")
    return _extension.cache_folder()


def _run(code: str, site: Path, cache: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    drop = ("CXX", "CC", "TRITON_INTERPRET", "VQKERNELS_BACKEND", "VQKERNELS_DISABLE_COMPILED")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"PYTHONPATH": str(site), "VQKERNELS_CACHE": str(cache), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, "-c", code.format(target=str(site))]
    return subprocess.run(command, cwd=site.parent, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_sources_and_nothing_compiled(installed: Path):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"vqkernels/csrc/registration.cpp", "vqkernels/csrc/exact.h", "vqkernels/py.typed"} <= names
    assert any(name.startswith("vqkernels/models/configs/") for name in names)
    assert any(name.endswith(".cu") for name in names)
    assert any(name.startswith("vqkernels/benchmarks/") for name in names)
    assert not any(name.endswith((".so", ".o", ".pyc")) or name.startswith("tests/") for name in names)


def test_a_wheel_with_the_library_inside_needs_no_compiler(tmp_path: Path):
    quick = tmp_path / "quick-c++"  # which does not optimise: what is looked at is the wheel
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    wheel, site = _install(tmp_path, VQKERNELS_PREBUILD="1", CXX=str(quick))
    assert "cp310-abi3" in wheel.name
    done = _run(ROUND_TRIP, site, tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "compiled   runs here  <- chosen" in done.stdout


def test_the_console_script_runs(installed: Path, cache: Path):
    code = "from vqkernels.cli.main import main; assert Path(vq.__file__).is_relative_to({target!r}); main(['info'])"
    done = _run("import vqkernels as vq; from pathlib import Path; " + code, installed, cache)
    assert done.returncode == 0, done.stderr
    assert vq.__version__ in done.stdout
    assert os.access(installed / "bin" / "vqkernels", os.X_OK)


def test_it_works_away_from_the_checkout(installed: Path, cache: Path, tmp_path: Path):
    done = _run(ROUND_TRIP, installed, cache, path=str(tmp_path))  # where no compiler is
    assert done.returncode == 0, done.stderr
    assert "compiled   runs here  <- chosen" in done.stdout


def test_it_works_without_a_compiler_and_says_so_once(installed: Path, tmp_path: Path):
    done = _run(ROUND_TRIP + "vq.nearest(codebook, codebook)", installed, tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "reference  runs here  <- chosen" in done.stdout
    assert done.stderr.count("vqkernels") >= 1
    assert done.stderr.lower().count("compiler") == 1, done.stderr


def test_the_library_uses_the_stable_abi_alone():
    reason = _extension.cpu_library()
    assert reason is None, reason
    (library,) = _extension.library_path().parent.glob("*.so")
    audit = [str(Path(sys.executable).with_name("torch-abi-audit")), str(library)]
    done = subprocess.run(audit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "STABLE" in done.stdout
    assert "UNSTABLE" not in done.stdout


def test_version_is_one_number():
    import importlib.metadata

    assert importlib.metadata.version("vqkernels") == vq.__version__

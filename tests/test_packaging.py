"""What a user installs: a wheel with the sources inside, working anywhere, with and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vqkernels as vq
from vqkernels import _extension

ROOT = Path(__file__).parent.parent
ROUND_TRIP = """
import torch, vqkernels as vq
from vqkernels.models import VQVAE, VQVAEConfig
from pathlib import Path
assert Path(vq.__file__).is_relative_to({target!r}), vq.__file__
codebook = torch.randn(50, 8)
codes, distance = vq.nearest(codebook.flip(0), codebook)
assert codes.tolist() == list(range(49, -1, -1)) and not distance.any()
model = VQVAE(VQVAEConfig()).eval()
images = torch.rand(1, 3, 8 * model.factor, 8 * model.factor) * 2 - 1
assert model.decode(model.encode(images)).shape == images.shape
print(vq.explain("nearest", codebook, codebook))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, built from a copy of the sources that git would ship."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, "."], cwd=_copy(folder / "source"), check=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def _copy(target: Path) -> Path:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def _run(code: str, site: Path, cache: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    drop = ("CXX", "CC", "TRITON_INTERPRET", "VQKERNELS_BACKEND", "VQKERNELS_DISABLE_COMPILED")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"PYTHONPATH": str(site), "VQKERNELS_CACHE": str(cache), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, "-c", code.format(target=str(site))]
    return subprocess.run(command, cwd=cache, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_sources_and_nothing_compiled(installed: Path):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"vqkernels/csrc/registration.cpp", "vqkernels/csrc/exact.h", "vqkernels/py.typed"} <= names
    assert any(name.startswith("vqkernels/models/configs/") for name in names)
    assert any(name.endswith(".cu") for name in names)
    assert any(name.startswith("vqkernels/benchmarks/") for name in names)
    assert not any(name.endswith((".so", ".o", ".pyc")) or name.startswith("tests/") for name in names)


def test_it_works_away_from_the_checkout(installed: Path, tmp_path: Path):
    done = _run(ROUND_TRIP, installed, tmp_path)
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
    (library,) = _extension.cpu_library_path().parent.glob("*.so")
    audit = [str(Path(sys.executable).with_name("torch-abi-audit")), str(library)]
    done = subprocess.run(audit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "STABLE" in done.stdout
    assert "UNSTABLE" not in done.stdout


def test_version_is_one_number():
    import importlib.metadata

    assert importlib.metadata.version("vqkernels") == vq.__version__

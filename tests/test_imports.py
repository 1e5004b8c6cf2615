"""Imports run one way through the house, and `import vqkernels` does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# who may import whom: a room may import only what stands after its arrow
ALLOWED = {
    "cli": {
        *(
            "profiling",
            "audit",
            "export",
            "benchmarks",
            "models",
            "nn",
            "ops",
            "backends",
            "_extension",
            "testing",
            "_version",
        ),
        "_dtypes",
    },
    "profiling": {"benchmarks", "nn", "ops", "backends", "kernels", "_dtypes"},
    "audit": {"nn", "ops", "testing"},
    "export": {"ops"},
    "benchmarks": {"compat", "nn", "ops", "backends", "kernels", "_extension", "testing", "_version", "models"},
    "models": {"nn", "ops", "backends", "_version", "_dtypes"},
    "compat": {"nn", "ops", "backends", "_dtypes"},
    "nn": {"ops", "backends", "_dtypes"},
    "testing": {"ops", "kernels", "_dtypes"},
    "ops": {"backends", "_dtypes"},
    "backends": {"kernels", "_extension"},
    "kernels": {"_extension", "_dtypes"},
    "_extension": {"_version"},
}
ROOMS = {"models": ROOT / "models", "benchmarks": ROOT / "benchmarks"}


def _files(room: str) -> list[Path]:
    folder = ROOMS.get(room, ROOT / "vqkernels" / room)
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / "vqkernels" / f"{room}.py"]


def _package(room: str, path: Path) -> list[str]:
    folder = ROOMS.get(room, ROOT / "vqkernels" / room)
    inner = path.parent.relative_to(folder).parts if folder.is_dir() else ()
    return ["vqkernels", *([room] if folder.is_dir() else []), *inner]


def _imported(room: str, path: Path) -> set[str]:
    """Absolute names of everything a file imports, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _package(room, path)[: -(node.level - 1) or None] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {stem} if node.module else {f"{stem}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room: str):
    for path in _files(room):
        for name in _imported(room, path):
            parts = name.split(".")
            if parts[0] == "vqkernels" and len(parts) > 1 and parts[1] != room:
                assert parts[1] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


def test_reference_kernels_need_torch_alone_and_triton_stays_in_its_files():
    third_party = {"numpy", "triton", "PIL", "rich"}
    for path in _files("kernels"):
        roots = {name.split(".")[0] for name in _imported("kernels", path)}
        if path.name.startswith("reference_"):
            assert not roots & third_party, path.name
        if not path.name.startswith("triton_"):
            assert "triton" not in roots, path.name


def test_importing_the_package_is_free():
    code = "import sys, vqkernels; assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_functions_are_not_hidden_by_modules_of_the_same_name():
    code = "import vqkernels.ops.nearest, vqkernels as vq; assert callable(vq.nearest) and callable(vq.quantize)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_is_longer_than_500_lines():
    for room in ALLOWED:
        for path in _files(room):
            assert len(path.read_text().splitlines()) <= 500, path

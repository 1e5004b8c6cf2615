"""benchmarks/gpu.sh keeps its promises where there is no GPU: plan, budgets, going on after a failure."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
PARTS = [
    "environment",
    "install",
    "build",
    "tests",
    "hopper",
    "memcheck",
    "racecheck",
    "initcheck",
    "search",
    "search-hopper",
    "tune",
    "counters",
    "train-step",
    "ema",
]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _python(folder: Path, body: str) -> str:
    """A stand-in for Python that does ``body``."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_dry_run_prints_every_part_and_touches_nothing(tmp_path: Path):
    done = _run("--dry-run", "--out", str(tmp_path / "out"), "--python", "/opt/its/python")
    assert done.returncode == 0
    planned = re.findall(r"^\[(\S+), at most ([\d.]+) s\]$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in planned] == PARTS
    assert sum(float(seconds) for _, seconds in planned) <= 600
    assert not (tmp_path / "out").exists()
    for piece in ("/opt/its/python -m pytest", "compute-sanitizer --tool racecheck", "--no-index", "search.json"):
        assert piece in done.stdout


def test_dry_run_commands_are_valid_shell():
    done = _run("--dry-run")
    commands = re.sub(r"^\[.*\]$", "", done.stdout, flags=re.MULTILINE)
    subprocess.run([shutil.which("bash") or "bash", "-n"], input=commands, text=True, check=True)


def test_named_test_files_exist():
    named = set(re.findall(r"tests/\w+\.py", _run("--dry-run").stdout))
    assert len(named) >= 5
    assert all((SCRIPT.parent.parent / name).is_file() for name in named)


def test_a_failing_part_does_not_stop_the_next(tmp_path: Path):
    python = _python(tmp_path, 'case "$2" in pytest) exit 3 ;; *) echo fine ;; esac')
    done = _run("--out", str(tmp_path / "out"), "--only", "build,tests,ema", "--python", python)
    assert done.returncode == 1
    assert "failed: tests" in done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"^(\S+) +(ok|failed \(3\)) ", summary, flags=re.MULTILINE) == [
        ("build", "ok"),
        ("tests", "failed (3)"),
        ("ema", "ok"),
    ]
    assert (tmp_path / "out" / "ema.log").read_text() == "fine\n"


def test_a_part_ends_with_its_budget(tmp_path: Path):
    python = _python(tmp_path, "sleep 30")
    done = _run("--out", str(tmp_path / "out"), "--only", "ema", "--scale", "0.01", "--python", python)
    assert done.returncode == 1
    assert "out of time" in done.stdout


@pytest.mark.parametrize("options", [["--nonsense"], ["--out"], ["--only", "tests,nonsense"]])
def test_a_wrong_option_is_said(options: list[str]):
    done = _run(*options)
    assert done.returncode == 2
    assert "gpu.sh:" in done.stderr

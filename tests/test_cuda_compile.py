"""The CUDA sources compile, and every kernel fits: registers, spills and shared memory, read from ptxas."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_cuda import library as host
from requirements import skip_or_fail
from torch.utils import cpp_extension

from vqkernels import _extension

ARCHITECTURES = ("75", "80", "90a", "100", "120")
BUILD_ARCHITECTURE = "90"
SOURCES = [path.stem for path in _extension.cuda_sources()]
FLAGS = [*_extension.CUDA_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS]

REGISTERS = {"score_kernel": 128, "decide_kernel": 128}  # two blocks of 256 on a multiprocessor, four of 128
OTHER_REGISTERS = 80  # three blocks of 256
SHARED_BYTES = 48 * 1024  # more needs an opt-in at every launch
# The exact road's fixed-point sums are indexed at run time: 24 or, for float64 inputs, 136 digits of 8 bytes each.
STACK_BYTES = {"decide_kernel<double>": 136 * 8 + 16, "decide_kernel": 24 * 8 + 16}


@dataclass(frozen=True)
class Usage:
    """One kernel of one architecture."""

    name: str  # decide_kernel<double>
    registers: int
    stack: int  # bytes, spills included
    spilled: int  # bytes
    shared: int  # bytes

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]


def _compile(nvcc: str, source: Path, mode: list[str]) -> str:
    """nvcc's messages for ``source``, from the cache where nothing has changed; raises with them on an error."""
    command = [nvcc, *FLAGS, *mode]
    read = [*host.sources(), *sorted((host.CSRC / "cuda").glob("*.cu")), *host.HERE.glob("*.cu")]
    log = host.cache_folder() / f"nvcc-{source.stem}-{host.digest_of(read, *command)}.log"
    if log.exists():
        return log.read_text()
    objects = log.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run([*command, str(source), "-o", str(objects)], capture_output=True, text=True, check=False)
    objects.unlink(missing_ok=True)
    if done.returncode != 0:
        raise AssertionError(f"{source.name}: {done.stderr[-4000:]}")
    log.write_text(done.stderr)
    return done.stderr


def _whole_file(nvcc: str, stem: str) -> str:
    """Launchers and registration; unoptimised, since the kernels themselves are compiled below."""
    quick = ["-Xcicc=-O0", "-Xptxas=-O0"]
    mode = [f"-gencode=arch=compute_{BUILD_ARCHITECTURE},code=sm_{BUILD_ARCHITECTURE}", "-Xcompiler=-fPIC", "-c"]
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    return _compile(nvcc, host.CSRC / "cuda" / f"{stem}.cu", [*mode, *quick, *includes])


def _kernels_only(nvcc: str, architecture: str) -> str:
    mode = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    return _compile(nvcc, host.HERE / "all_kernels.cu", mode)


@pytest.fixture(scope="module")
def messages():
    """Futures of nvcc's messages, all started at once: by source name and by architecture."""
    home = _extension._cuda_home()
    nvcc = str(home / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        skip_or_fail("nvcc", "no nvcc")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {name: pool.submit(_kernels_only, nvcc, name) for name in ARCHITECTURES}
        jobs |= {stem: pool.submit(_whole_file, nvcc, stem) for stem in SOURCES}
        yield jobs


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"vqkernels::cuda::|^void ", "", line) for line in done.stdout.splitlines()]


def _usage(text: str) -> list[Usage]:
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, text, flags=re.DOTALL)
    kernels = []
    for name, (_, stack, stored, loaded, registers, rest) in zip(_demangled([f[0] for f in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = max(int(stored), int(loaded))
        short = name.partition("(")[0]
        kernels.append(Usage(short, int(registers), int(stack), spilled, int(shared[1]) if shared else 0))
    return kernels


@pytest.mark.parametrize("stem", SOURCES)
def test_every_source_compiles_without_a_warning(messages, stem: str):
    assert "warning" not in messages[stem].result()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits(messages, architecture: str):
    kernels = _usage(messages[architecture].result())
    families = {kernel.family for kernel in kernels}
    assert {"score_kernel", "decide_kernel", "gather_kernel", "sum_chunks_kernel", "update_rows_kernel"} <= families
    for kernel in kernels:
        assert kernel.registers <= REGISTERS.get(kernel.family, OTHER_REGISTERS), kernel
        assert kernel.spilled == 0, kernel
        assert kernel.stack <= STACK_BYTES.get(kernel.name, STACK_BYTES.get(kernel.family, 0)), kernel
        assert kernel.shared <= SHARED_BYTES, kernel

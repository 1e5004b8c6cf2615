"""The CUDA sources compile, and every kernel fits: registers, spills and shared memory, read from ptxas."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from host_cuda import library as host
from host_cuda import ptxas
from host_cuda.ptxas import ARCHITECTURES, FLAGS, Usage
from host_cuda.ptxas import usage as _usage
from requirements import skip_or_fail
from torch.utils import cpp_extension

from vqkernels import _extension

__all__ = ["FLAGS", "Usage"]

BUILD_ARCHITECTURE = "90a"
SOURCES = [path.stem for path in _extension.cuda_sources()]

# 512 threads on a multiprocessor, 256 of the coarse pass, and 768 of the others.
REGISTERS = {"mma_kernel": 255, "double_kernel": 128, "finish_kernel": 128}
OTHER_REGISTERS = 80
SHARED_BYTES = 48 * 1024  # more needs an opt-in at every launch
TURING_SHARED_BYTES = 32 * 1024  # two blocks on a multiprocessor
# The exact road's fixed-point sums are indexed at run time: 24 or, for float64 inputs, 136 digits of 8 bytes each.
DECIDE_STACK = (24 * 8 + 16, 136 * 8 + 16)  # in finish_kernel
FAMILIES = {"prepare_kernel", "mma_kernel", "double_kernel", "finish_kernel", "gather_kernel"}
FAMILIES |= {"sum_chunks_kernel", "update_rows_kernel", "prepare_tokens_kernel"}


def _whole_file(stem: str):
    """Launchers and registration; the kernels, which are compiled below, only to unoptimised PTX."""
    quick = ["-Xcicc=-O0"]
    virtual = f"compute_{BUILD_ARCHITECTURE}"
    mode = [f"-gencode=arch={virtual},code={virtual}", "-Xcompiler=-fPIC", "-c"]
    mode += ["-DVQKERNELS_SM90A"]  # as the package itself builds for compute capability 9.0
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    return ptxas.compile_source(host.CSRC / "cuda" / f"{stem}.cu", [*mode, *quick, *includes])


@pytest.fixture(scope="module")
def products():
    """Futures of compiled files, all started at once: by source name and by architecture."""
    if ptxas.nvcc() is None:
        skip_or_fail("nvcc", "no nvcc")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {name: pool.submit(ptxas.compile_kernels, name) for name in ARCHITECTURES}
        jobs["hopper_kernels"] = pool.submit(ptxas.compile_kernels, BUILD_ARCHITECTURE, "hopper_kernels")
        jobs |= {stem: pool.submit(_whole_file, stem) for stem in SOURCES}
        yield jobs


@pytest.mark.parametrize("stem", SOURCES)
def test_every_source_compiles_without_a_warning(products, stem: str):
    assert "warning" not in products[stem].result().with_suffix(".log").read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits(products, architecture: str):
    kernels = _usage(products[architecture].result().with_suffix(".log").read_text())
    assert {kernel.family for kernel in kernels} >= FAMILIES
    for kernel in kernels:
        assert kernel.registers <= REGISTERS.get(kernel.family, OTHER_REGISTERS), kernel
        assert kernel.spilled == 0, kernel
        assert kernel.stack <= (DECIDE_STACK["double" in kernel.name] if kernel.family == "finish_kernel" else 0), (
            kernel
        )
        assert kernel.shared <= (TURING_SHARED_BYTES if architecture == "75" else SHARED_BYTES), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_coarse_pass_runs_on_the_matrix_units(products, architecture: str):
    if ptxas.disassembler() is None:
        skip_or_fail("nvcc", "no cuobjdump")
    found = ptxas.instructions(products[architecture].result(), family="mma_kernel")
    product = "HMMA.1688.F32" if architecture == "75" else "HMMA.16816.F32"
    for name in ("mma_kernel<false>", "mma_kernel<true>"):
        assert found[name][product] >= 64, found[name]  # a step of 32 columns, unrolled
        assert found[name]["LDSM"] == 16
        assert (found[name]["LDGSTS"] > 0) == (architecture != "75")  # copies past the registers


def test_the_lists_name_every_kernel_of_the_sources(products):
    """ptxas sees what all_kernels.cu and hopper_kernels.cu name, and of the package's own files nothing."""
    if ptxas.disassembler() is None:
        skip_or_fail("nvcc", "no cuobjdump")
    lists = (BUILD_ARCHITECTURE, "hopper_kernels")
    named = {
        kernel.name for name in lists for kernel in _usage(products[name].result().with_suffix(".log").read_text())
    }
    built = {name for stem in SOURCES for name in ptxas.entries(products[stem].result())}
    assert len(built) > 20
    assert built == named

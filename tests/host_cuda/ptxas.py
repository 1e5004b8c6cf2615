"""What the compiler says of the CUDA kernels: registers, spills, shared memory and instructions, by architecture.

python tests/host_cuda/ptxas.py FILE writes the table of all kernels as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from host_cuda import library as host

from vqkernels import _extension

ARCHITECTURES = ("75", "80", "90a", "100", "120")
FLAGS = [*_extension.CUDA_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS]
TENSOR_CORES = r"\b(HMMA\.[\w.]+|HGMMA\.[\w.]+|LDSM|LDGSTS|UTMALDG)"


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


def nvcc() -> str | None:
    """The compiler of the toolkit that the package itself would use."""
    home = _extension._cuda_home()
    return str(home / "bin" / "nvcc") if home else shutil.which("nvcc")


def compile_source(source: Path, mode: list[str]) -> Path:
    """The object of ``source`` and, beside it with suffix .log, nvcc's messages; from the cache if nothing changed.

    Raises:
        AssertionError: it does not compile; with the messages.
    """
    command = [nvcc() or "nvcc", *FLAGS, *mode]
    read = [*host.sources(), *sorted((host.CSRC / "cuda").glob("*.cu")), *host.HERE.glob("*.cu")]
    product = host.cache_folder() / f"nvcc-{source.stem}-{host.digest_of(read, *command)}.o"
    log = product.with_suffix(".log")
    if log.exists():
        return product
    unfinished = product.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run([*command, str(source), "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{source.name}: {done.stderr[-4000:]}")
    unfinished.replace(product)
    log.write_text(done.stderr)
    return product


def compile_kernels(architecture: str, source: str = "all_kernels") -> Path:
    """Every kernel that ``source``.cu names, as machine code of one architecture."""
    mode = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    return compile_source(host.HERE / f"{source}.cu", mode)


@lru_cache
def demangled(name: str) -> str:
    """decide_kernel<double> for its mangled name."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    return re.sub(r"vqkernels::cuda::|^void ", "", done.stdout.strip()).partition("(")[0]


def usage(text: str) -> list[Usage]:
    """ptxas' messages, read."""
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    kernels = []
    for name, stack, stored, loaded, registers, rest in re.findall(pattern, text, flags=re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled, static = max(int(stored), int(loaded)), int(shared[1]) if shared else 0
        kernels.append(Usage(demangled(name), int(registers), int(stack), spilled, static))
    return kernels


def disassembler() -> str | None:
    """cuobjdump: of the toolkit, on PATH, or inside the triton package."""
    home = _extension._cuda_home()
    places = [*([home / "bin"] if home else []), *(Path(p) / "triton/backends/nvidia/bin" for p in sys.path)]
    found = next((place / "cuobjdump" for place in places if (place / "cuobjdump").is_file()), None)
    return str(found) if found else shutil.which("cuobjdump")


def instructions(product: Path, pattern: str = TENSOR_CORES, family: str = "") -> dict[str, Counter[str]]:
    """How often each kernel's machine code has each instruction that matches; of one family of kernels, or of all."""
    names = re.findall(r"entry function '(\w+)'", product.with_suffix(".log").read_text())
    wanted = [name for name in names if demangled(name).startswith(family)]  # to print all takes seconds
    command = [disassembler() or "cuobjdump", "-sass", "-fun", ",".join(wanted), str(product)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\w+)$", text, flags=re.MULTILINE)
    return {
        demangled(name): Counter(re.findall(pattern, code)) for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def entries(product: Path) -> set[str]:
    """The kernels of this package in an object's PTX; not those of CUB."""
    command = [disassembler() or "cuobjdump", "-ptx", str(product)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {demangled(name) for name in re.findall(r"\.entry (\w+)\(", text) if "vqkernels4cuda" in name}


def table() -> dict[str, list[dict[str, object]]]:
    """Architecture -> kernels with their registers, bytes of stack, spills and static shared memory, instructions."""
    rows: dict[str, list[dict[str, object]]] = {}
    for architecture in ARCHITECTURES:
        sources = ["all_kernels", *(["hopper_kernels"] if architecture == "90a" else [])]
        products = [compile_kernels(architecture, source) for source in sources]
        rows[f"sm_{architecture}"] = [row for product in products for row in _rows(product)]
    return rows


def _rows(product: Path) -> list[dict[str, object]]:
    found = instructions(product) if disassembler() else {}
    kernels = usage(product.with_suffix(".log").read_text())
    return [
        asdict(kernel) | {"instructions": dict(sorted(found.get(kernel.name, Counter()).items()))}
        for kernel in sorted(kernels, key=lambda kernel: kernel.name)
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(table(), indent=1) + "\n")

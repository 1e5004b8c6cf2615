"""Every Triton launch compiles for every supported architecture, without spills and within its shared memory.

The interpreter takes what the compiler refuses, and compiling needs no GPU. Two processes run the real launchers on CPU
tensors under a stand-in driver, so that what is compiled is what would be launched, argument specialisation included.
Run as a script with architectures as arguments, this file is such a process. Triton caches: a second run is quick.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from requirements import skip_or_fail

# shared memory that one block may ask for, in bytes (CUDA programming guide, table of compute capabilities)
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
PROCESSES = ((80, 120), (90, 100))
# bytes of stack a thread: what ptxas saves around its calls to float64 division in the rare, scalar exact road
MAX_STACK = {"exact_kernel": 64}
KERNELS = {
    *("coarse_kernel", "finish_kernel", "exact_kernel", "gather_kernel", "backward_kernel"),
    *("piece_kernel", "join_kernel", "kept_kernel", "size_kernel", "row_kernel"),
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """One record a compiled kernel: see ``record_of``."""
    if importlib.util.find_spec("triton") is None:
        skip_or_fail("triton", "triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers = [
        subprocess.Popen([sys.executable, __file__, *map(str, archs)], env=env, stdout=-1, stderr=-1, text=True)
        for archs in PROCESSES
    ]
    results = [(*worker.communicate(timeout=500), worker.returncode) for worker in workers]
    for _, errors, status in results:
        assert status == 0, errors[-4000:]
    return [record for out, _, _ in results for record in json.loads(out.splitlines()[-1])]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_launches_fit_registers_and_shared_memory(compiled, arch):
    mine = [record for record in compiled if record["arch"] == arch]
    assert {record["kernel"] for record in mine} == KERNELS
    for record in mine:
        assert record["stack"] <= MAX_STACK.get(record["kernel"], 0), record
        assert record["shared"] <= SHARED_MEMORY[arch], record


def test_every_configuration_of_the_heuristics_is_compiled(compiled):
    from vqkernels.kernels.triton_common import TILES
    from vqkernels.kernels.triton_nearest import CONFIGS

    for arch in SHARED_MEMORY:
        mine = [record for record in compiled if record["arch"] == arch]
        for dtype in ("fp32", "fp16", "bf16"):
            seen = [record["options"] for record in mine if record["x"] == f"*{dtype}"]
            for config in CONFIGS:
                assert any(asdict(config).items() <= options.items() for options in seen), (arch, dtype, config)
            for tile in TILES:
                shape = {"block_n": tile.rows, "block_d": tile.dims, "num_warps": tile.num_warps}
                assert any(shape.items() <= options.items() for options in seen), (arch, dtype, tile)


def test_scores_are_full_float32(compiled):
    """The bound counts on float32 products and sums: no TF32, no flushing of subnormals."""
    searching = [r for r in compiled if r["kernel"] in ("coarse_kernel", "finish_kernel", "exact_kernel")]
    for record in searching:
        assert not record["tensor_core"], record
        assert not record["flushes"], record


class StandInDriver:
    """What Triton asks of a driver before a launch; the architecture serves as the device's number."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread, as the compiled kernel declares them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout).groups()
    return int(registers), int(stack)


def record_of(kernel: Any, arch: int, name: str, options: dict[str, Any]) -> dict[str, Any]:
    registers, stack = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return {
        "arch": arch,
        "kernel": name,
        "x": kernel.src.signature.get("x_ptr"),
        "options": {key.lower(): value for key, value in options.items()},
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "tensor_core": "mma" in ptx,
        "flushes": ".ftz" in ptx,
    }


def launch_everything() -> None:
    """Shapes that make the launchers choose each configuration, and each kind of stride and alignment."""
    import torch

    from vqkernels.kernels import triton_codebook, triton_nearest, triton_training

    codebook_size = 37
    plain: list[Any] = [
        (torch.float32, (8, 100), (300, 100)),
        (torch.float16, (8, 100), (300, 100)),
        (torch.bfloat16, (8, 100), (300, 100)),
    ]
    for dtype, *shapes in plain:
        for dim, tokens in shapes:
            x, codebook = torch.zeros(1, tokens, dim, dtype=dtype), torch.zeros(codebook_size, dim, dtype=dtype)
            codes, derror = torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, tokens)
            for metric in ("euclidean", "cosine"):
                triton_nearest.nearest(x, codebook, metric, "exact")
            triton_training.gather(x, codebook, codes)
            for rotation in (False, True):
                triton_training.quantize_backward(x, x, codes, x, derror, rotation)
            triton_codebook.codebook_stats(x, codes, codebook_size)
    many = torch.zeros(1, 5000, 64)  # rows of whole 16-byte units
    triton_nearest.nearest(many, torch.zeros(codebook_size, 64), "euclidean", "exact")
    maps = torch.zeros(2, 64, 100).transpose(1, 2)  # channels first
    triton_nearest.nearest(maps, torch.zeros(codebook_size, 64), "euclidean", "fast")
    for dim in (8, 64):
        for normalize in (False, True):
            rows, sizes = torch.zeros(codebook_size, dim), torch.zeros(codebook_size)
            revive = torch.zeros(codebook_size, dtype=torch.bool)
            triton_codebook.ema_update_(rows, sizes, rows, sizes, rows, revive, 0.99, 1e-5, 1.0, normalize)


def main(archs: list[int]) -> None:
    """Compile every launch for each architecture and print the records as one line of JSON."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    records: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in records:
            records[kernel.hash] = record_of(kernel, driver.active.arch, self.__name__, options)
        return kernel

    JITFunction.run = compile_only
    for arch in archs:
        driver.set_active(StandInDriver(arch))
        launch_everything()
    print(json.dumps(list(records.values())))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])

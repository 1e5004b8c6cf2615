"""Every Triton launch compiles for every supported architecture, without spills and within its shared memory.

The interpreter takes what the compiler refuses, and compiling needs no GPU. Two processes run the real launchers on CPU
tensors under a stand-in driver, so that what is compiled is what would be launched, argument specialisation included.
Run as a script with architectures as arguments, this file is such a process. Triton caches: a second run is quick.
"""

from __future__ import annotations

import importlib.util
import itertools
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
# bytes of stack a thread: what ptxas saves around its calls to float64 division and square roots
MAX_STACK = {"finish_kernel": 64, "operands_kernel": 32}
# the same, and what ptxas puts there to hold it to 128 registers; it has no product
MAX_STACK |= {"order_kernel": 96}
SCORE_KERNELS = {"forward_kernel", "code_sums_kernel", "mean_kernel"}
SOFTMAX_KERNELS = {*SCORE_KERNELS, "sample_kernel", "token_kernel", "code_kernel"}
# up to four registers, which ptxas puts there to fit one more program on a multiprocessor (it stops at 168 or 128)
MAX_STACK |= dict.fromkeys(SOFTMAX_KERNELS, 16)
# 12.0 has a 64th of float32's units for float64, and ptxas saves more around it; the kernel has no product there either
MAX_STACK_OF = {120: MAX_STACK | {"order_kernel": 216}}
LIST_KERNELS = {"limit_kernel", "collect_kernel", "order_kernel"}  # of nearest_k
NO_LISTS = {100}  # which Triton does not compile them for: triton_nearest_k.NO_COLLECT
SEARCH_KERNELS = {"operands_kernel", "coarse_kernel", "finish_kernel", *LIST_KERNELS}
KERNELS = {
    *SEARCH_KERNELS,
    *("gather_kernel", "backward_kernel"),
    *("piece_kernel", "join_kernel", "kept_kernel", "size_kernel", "row_kernel", "merge_kernel"),
    *SOFTMAX_KERNELS,
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
    results = [(*worker.communicate(timeout=1500), worker.returncode) for worker in workers]
    for _, errors, status in results:
        assert status == 0, errors[-4000:]
    return [record for out, _, _ in results for record in json.loads(out.splitlines()[-1])]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_launches_fit_registers_and_shared_memory(compiled, arch):
    mine = [record for record in compiled if record["arch"] == arch]
    assert {record["kernel"] for record in mine} == KERNELS - (LIST_KERNELS if arch in NO_LISTS else set())
    for record in mine:
        assert record["stack"] <= MAX_STACK_OF.get(arch, MAX_STACK).get(record["kernel"], 0), record
        assert record["shared"] <= SHARED_MEMORY[arch], record


def test_every_configuration_is_compiled(compiled):
    """Those of the search wherever its tiles fit, and each tile of the other kernels for each dtype."""
    from vqkernels.kernels import triton_configs
    from vqkernels.kernels.triton_common import TILES

    for arch in SHARED_MEMORY:
        mine = [record for record in compiled if record["arch"] == arch]
        coarse = [record["options"] for record in mine if record["kernel"] == "coarse_kernel"]
        for config in {config for dim in (8, 32, 64) for config in triton_configs.usable(dim, gpu_of(arch))}:
            wanted = {key: value for key, value in asdict(config).items() if key != "terms"}
            assert any(wanted.items() <= options.items() for options in coarse), (arch, config)
        for dtype in ("fp32", "fp16", "bf16"):
            seen = [record["options"] for record in mine if record["x"] == f"*{dtype}"]
            for tile in TILES:
                shape = {"block_n": tile.rows, "block_d": tile.dims, "num_warps": tile.num_warps}
                assert any(shape.items() <= options.items() for options in seen), (arch, dtype, tile)


def test_every_softmax_configuration_is_compiled(compiled):
    """For the architectures that it is for, by each kernel that takes it."""
    from vqkernels.kernels.triton_softmax_tiles import configs_of

    for arch in SHARED_MEMORY:
        scores, gradients = configs_of(gpu_of(arch))
        wanted = dict.fromkeys(SCORE_KERNELS, scores) | {"token_kernel": gradients, "code_kernel": gradients}
        for name, configs in wanted.items():
            seen = [r["options"] for r in compiled if (r["arch"], r["kernel"]) == (arch, name)]
            for config in configs:
                by_codes = name in ("code_sums_kernel", "code_kernel")
                n, k = (config.stream, config.keep) if by_codes else (config.keep, config.stream)
                shape = {"block_n": n, "block_k": k, "block_d": config.block_d, "precision": config.precision}
                assert any(shape.items() <= options.items() for options in seen), (arch, name, config)


def test_products_run_on_tensor_cores_and_nothing_else_does(compiled):
    """fp16, or three tf32 products but on 12.0, where float32 is as quick as one of them. The search's float32 and
    float64 elsewhere keep their subnormals, which its bound counts on."""
    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
    for record in compiled:
        kernels = {"coarse_kernel", "collect_kernel", *(SOFTMAX_KERNELS if record["arch"] != 120 else ())}
        expected = [instruction[record["arch"]]] if record["kernel"] in kernels else []
        assert record["tensor_core"] == expected, record
        if record["kernel"] in SEARCH_KERNELS:
            assert not record["flushes"], record


def test_no_recompilation_when_the_batch_or_the_codebook_grows(compiled):
    """Per architecture: three batches and codebook sizes more, on strides of the same kind, compiled nothing new."""
    assert all(record["new_by_size"] == 0 for record in compiled)


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
        "tensor_core": sorted(set(re.findall(r"mma\.sync|wgmma|tcgen05(?=\.mma)", ptx))),
        "flushes": ".ftz" in ptx,
    }


def gpu_of(arch: int) -> Any:
    from vqkernels.kernels.triton_configs import Gpu

    return Gpu(f"sm_{arch}", arch, SHARED_MEMORY[arch])


def launch_search(arch: int) -> None:
    """Every configuration that fits, at dims that differ in how |c|^2 enters; each dtype, metric and kind of stride."""
    import torch

    from vqkernels.kernels import triton_configs, triton_nearest

    def operands(dim: int, config: Any, cosine: bool = False) -> None:
        x, codebook = torch.zeros(1, 300, dim), torch.zeros(37, dim)
        made = triton_nearest.prepare(x, codebook, cosine, config)
        triton_nearest.coarse(made, triton_configs.operand_of(config, dim, cosine), config, 1)

    gpu = gpu_of(arch)
    for dim in (8, 32, 64, 256, 300):
        for config in triton_configs.usable(dim, gpu):
            if config.pack == (dim > 48) and (config.terms == 3) == (dim == 8):
                operands(dim, config)
    small, deep = (triton_configs.choose_config(5000, 1 << 20, dim, gpu) for dim in (8, 256))
    operands(256, deep, cosine=True)
    for dim, config in ((8, small), (256, deep)):
        codebook = torch.zeros(37, dim)
        for cosine in (False, True):
            triton_nearest.search(torch.zeros(1, 300, dim), codebook, cosine, config)
            kept = triton_nearest.prepare_codes(codebook, cosine, config)
            triton_nearest.search(torch.zeros(1, 300, dim), codebook, cosine, config, kept)
    for dtype in (torch.float16, torch.bfloat16):
        triton_nearest.search(torch.zeros(1, 300, 64, dtype=dtype), torch.zeros(37, 64, dtype=dtype), False, deep)
    maps = torch.zeros(2, 64, 100).transpose(1, 2)  # channels first
    triton_nearest.search(maps, torch.zeros(37, 64), False, deep)
    if arch == 90:
        triton_nearest.search(torch.zeros(1, 300, 1), torch.zeros(37, 1), False, small)  # D = 1 is a constant to Triton


def launch_nearest_k(arch: int) -> None:
    """As launch_search: every configuration that fits, and each dtype, metric and kind of stride."""
    import torch

    from vqkernels.kernels import triton_configs, triton_nearest_k

    if arch // 10 == triton_nearest_k.NO_COLLECT:
        return
    gpu = gpu_of(arch)
    for dim in (8, 32, 256):  # one of each kind of operand: launch_search has the products of more
        for config in triton_configs.usable(dim, gpu):
            if config.pack == (dim > 48) and (config.terms == 3) == (dim == 8):
                triton_nearest_k.search_k(torch.zeros(1, 300, dim), torch.zeros(37, dim), 3, False, config)
    small, deep = (triton_configs.choose_config(5000, 1 << 20, dim, gpu) for dim in (8, 256))
    for dim, config in ((8, small), (256, deep)):
        triton_nearest_k.search_k(torch.zeros(1, 300, dim), torch.zeros(37, dim), 3, True, config)
    for dtype in (torch.float16, torch.bfloat16):
        x, codebook = torch.zeros(1, 300, 64, dtype=dtype), torch.zeros(37, 64, dtype=dtype)
        triton_nearest_k.search_k(x, codebook, 3, False, deep)
    triton_nearest_k.search_k(torch.zeros(2, 64, 100).transpose(1, 2), torch.zeros(37, 64), 3, False, deep)


def launch_other_sizes(arch: int) -> None:
    """Shapes that were compiled for, but for N, B, K, k and the number of splits."""
    import torch

    from vqkernels.kernels import triton_configs, triton_nearest, triton_nearest_k

    config = triton_configs.choose_config(5000, 1 << 20, 256, gpu_of(arch))
    shape = triton_configs.operand_of(config, 256, False)
    for batch, tokens, k in ((1, 1, 1), (3, 77, 4096), (2, 1024, 1000)):
        x, codebook = torch.zeros(batch, tokens, 256), torch.zeros(k, 256)
        triton_nearest.search(x, codebook, False, config)
        triton_nearest.search(x, codebook, False, config, triton_nearest.prepare_codes(codebook, False, config))
        if arch // 10 != triton_nearest_k.NO_COLLECT:
            triton_nearest_k.search_k(x, codebook, min(k, 40), False, config)
        triton_nearest.coarse(triton_nearest.prepare(x, codebook, False, config), shape, config, 1000)


def launch_softmax(
    arch: int,
    dims: tuple[int, ...],
    sizes: tuple[tuple[int, int, int], ...],  # batch, tokens, K
    most: bool,
) -> None:
    """Every op: with the most arguments and what streams in many parts, or with the least and in one."""
    import torch

    from vqkernels.kernels import triton_softmax, triton_softmax_backward, triton_softmax_tiles

    triton_softmax.device_of = triton_softmax_backward.device_of = lambda x: gpu_of(arch)
    triton_softmax_tiles.slots_of = lambda x, config: 1000 if most else 1
    for dim, (batch, tokens, k) in itertools.product(dims, sizes):
        x, codebook = torch.zeros(batch, tokens, dim), torch.zeros(k, dim)
        each, per_code = torch.zeros(batch, tokens), torch.zeros(k)
        bias, sums, direction = (per_code, per_code, x) if most else (None, None, None)
        logits = (x, codebook, bias, 0.5)
        triton_softmax.softmax_forward(*logits)
        triton_softmax.softmax_code_sums(*logits, each, each)
        triton_softmax.softmax_sample(*logits, each, each)
        triton_softmax_backward.softmax_backward(*logits, *[each] * 4, sums, direction, True)


def launch_training() -> None:
    """Shapes that make the launchers choose each tile."""
    import torch

    from vqkernels.kernels import triton_codebook, triton_training

    codebook_size = 37
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (8, 100):
            x, codebook = torch.zeros(1, 300, dim, dtype=dtype), torch.zeros(codebook_size, dim, dtype=dtype)
            codes, derror = torch.zeros(1, 300, dtype=torch.int64), torch.zeros(1, 300)
            triton_training.gather(x, codebook, codes)
            for rotation in (False, True):
                triton_training.quantize_backward(x, x, codes, x, derror, rotation)
            triton_training.quantize_backward(x, x, codes, None, derror, False, codes >= 0)
            triton_training.quantize_backward(x, x, codes, x, None, True)
            triton_codebook.codebook_stats(x, codes, codebook_size)
            triton_codebook.codebook_gradient(x, x, codes, derror, codebook_size)
    for dim in (8, 64):
        for normalize, plain in ((False, False), (True, False), (False, True)):
            rows, sizes = torch.zeros(codebook_size, dim), torch.zeros(codebook_size)
            revive = torch.zeros(codebook_size, dtype=torch.bool)
            triton_codebook.ema_update_(rows, sizes, rows, sizes, rows, revive, 0.99, 1e-5, 1.0, normalize, plain)


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
        launch_training()
        launch_search(arch)
        launch_nearest_k(arch)
        launch_softmax(arch, (8, 32, 64, 256), ((1, 300, 200),), most=True)
        launch_softmax(arch, (256,), ((1, 300, 200),), most=False)
        before = len(records)
        launch_other_sizes(arch)
        for most in (False, True):
            launch_softmax(arch, (256,), ((1, 1, 70), (3, 77, 4096), (2, 1024, 1000)), most)
        for record in records.values():
            record.setdefault("new_by_size", len(records) - before)
    print(json.dumps(list(records.values())))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])

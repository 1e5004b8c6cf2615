"""What a training run asks of its process: the accelerator, threads, deterministic algorithms, and how much memory."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import TrainConfig

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import broadcast_object_list, gather_object
except ImportError as error:
    raise ModuleNotFoundError(
        "training needs accelerate, which is not installed: pip install 'vqkernels[train]'", name="accelerate"
    ) from error

__all__ = ["broadcast_object_list", "gather_object", "make_accelerator", "peak_memory", "process_settings"]


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision, processes and trackers of a run.

    Raises:
        ValueError: what the config asks for is not there; names the option.
    """
    # said outright: left to itself on a machine without a GPU, accelerate makes N single processes out of torchrun's N
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.mixed_precision == "fp16" and on_cpu:
        raise ValueError("mixed_precision fp16 needs a GPU, got a CPU; use bf16 or no")
    if config.device == "cuda" and on_cpu:
        raise ValueError("device cuda was asked for, but torch sees no GPU")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # left by an earlier run of this Python process in another precision
    return Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=on_cpu,
        # the quantizer keeps its buffers alike on all ranks by itself
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=config.trackers or None,
        project_dir=config.output,
    )


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held so far, in MiB: of the GPU, or of the process where it trains on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilo = 1 if sys.platform == "darwin" else 1024  # macOS tells bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20


@contextmanager
def process_settings(config: TrainConfig) -> Iterator[None]:
    """Threads and deterministic algorithms as the run asks for, and afterwards as they were."""
    threads = torch.get_num_threads()
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        with warnings.catch_warnings():
            # of FSDP, on the quantizer's output, which is a view: nothing here writes into it
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark

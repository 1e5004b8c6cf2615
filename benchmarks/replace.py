"""What ``replace_quantizers`` saves: one training step of two models, before and after the swap.

    python -m vqkernels.benchmarks.replace --json benchmarks/results/cpu-replace.json

VectorQuantize (vector-quantize-pytorch): 4096 tokens, 16384 codes of 8 dimensions, between two small networks.
VQModel (diffusers): 4 images of 64 x 64, latents of 32 x 32, 16384 codes of 4 dimensions.

A step is forward, backward and an optimiser step, so that every codebook changes between steps. Times are taken in
turns in one process; peak memory in a fresh process each (see ``memory``). Codes that differ are counted, and looked
at in float64: how many of the peer's are farther than ours, and how many of ours farther than the peer's.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..compat import replace_quantizers
from .machine import fixed_threads
from .memory import TIMEOUT_SECONDS, Peak, measure_here
from .report import new_document, write_json
from .runner import measure, ratios

CODES = 16384
STATES = ("before", "after")
Action = Callable[[], object]


class TokenModel(nn.Module):
    """vector-quantize-pytorch's VectorQuantize between two small networks; tokens [N, 8]."""

    def __init__(self) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))
        self.quantize = VectorQuantize(8, CODES)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))
        with torch.no_grad():  # codes where the tokens are, as in a trained model
            self.quantize.codebook = self.encoder(torch.randn(CODES, 8))
            self.quantize._codebook.embed_avg.copy_(self.quantize._codebook.embed)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, 8] -> loss []
        quantized, _, loss = self.quantize(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss


class ImageModel(nn.Module):
    """diffusers' VQModel with latents of half the image's side."""

    def __init__(self) -> None:
        super().__init__()
        diffusers: Any = importlib.import_module("diffusers")  # its types say less than Any
        self.model = diffusers.VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=CODES,
            mid_block_add_attention=False,
        )
        # else a few codes would take all tokens
        nn.init.normal_(self.model.quantize.embedding.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> loss []
        out = self.model(x)
        return (out.sample - x).square().mean() + out.commit_loss


# name, model, shape of a batch, and of a tiny one that makes libraries set up their buffers
CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "VectorQuantize": (TokenModel, (4, 1024, 8), (1, 16, 8)),
    "VQModel": (ImageModel, (4, 3, 64, 64), (1, 3, 8, 8)),
}


def make(case: str, state: str) -> nn.Module:
    """The model as its library makes it, or with ours swapped in; both start alike."""
    torch.manual_seed(0)
    model = CASES[case][0]()
    if state == "after":
        replace_quantizers(model, strict=True)
    return model


def batch(case: str) -> Tensor:
    """The same numbers every time."""
    return torch.randn(CASES[case][1], generator=torch.Generator().manual_seed(1))


def training_step(model: nn.Module, x: Tensor) -> Action:
    """Forward, backward and an optimiser step on ``x``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return step


def compare_codes(case: str) -> dict[str, Any]:
    """One forward before and after: losses, and the tokens whose codes differ."""
    x, models = batch(case), {state: make(case, state) for state in STATES}
    seen: dict[str, tuple[Tensor, Any]] = {}
    losses = {}
    for state, model in models.items():
        quantizer = model.get_submodule("quantize" if case == "VectorQuantize" else "model.quantize")
        handle = quantizer.register_forward_hook(
            lambda _module, args, out, state=state: seen.__setitem__(state, (args[0].detach(), out))
        )
        rows = copy.deepcopy(quantizer.state_dict())  # EMA changes them in the forward
        losses[state] = float(model(x).detach())
        handle.remove()
    codebook = rows["_codebook.embed"][0] if "_codebook.embed" in rows else rows["embedding.weight"]
    tokens = seen["before"][0]
    tokens = tokens.movedim(1, -1) if tokens.dim() == 4 else tokens
    theirs, ours = (_indices(seen[state][1]).flatten() for state in STATES)
    apart = [(tokens.flatten(0, -2).double() - codebook.double()[codes]).square().sum(-1) for codes in (theirs, ours)]
    return {
        "tokens": theirs.numel(),
        "loss": losses,
        "codes_that_differ": int((theirs != ours).sum()),
        "peers_code_farther": int((apart[0] > apart[1]).sum()),
        "our_code_farther": int((apart[0] < apart[1]).sum()),
    }


def _indices(out: Any) -> Tensor:
    return out[2][2] if isinstance(out[2], tuple) else out[1]


def peak_of(case: str, state: str, threads: int) -> Peak:
    """Peak extra memory of one step, in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--child", json.dumps([case, state, threads])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Peak(None, f"took longer than {TIMEOUT_SECONDS} s")
    if done.returncode != 0:
        return Peak(None, (done.stderr.strip().splitlines() or ["no message"])[-1])
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def _child(case: str, state: str, threads: int) -> None:
    tiny = CASES[case][2]
    with fixed_threads(threads):
        model = make(case, state)
        training_step(model, torch.randn(tiny))()
        peak = measure_here(training_step(model, batch(case)))
    print(json.dumps({"bytes": peak.bytes, "method": peak.method}))


def run_case(case: str, threads: int, seconds: float) -> dict[str, Any]:
    """Everything about one model at one number of threads."""
    with fixed_threads(threads):
        x = batch(case)
        timings = measure({state: training_step(make(case, state), x) for state in STATES}, seconds=seconds)
        codes = compare_codes(case)
    peaks = {state: peak_of(case, state, threads) for state in STATES}
    return {
        "model": case,
        "batch": list(CASES[case][1]),
        "codes": CODES,
        "threads": threads,
        "step_ms": {state: timing.median * 1e3 for state, timing in timings.items()},
        "times_as_fast": statistics.median(ratios(timings["before"], timings["after"])),
        "rounds": len(timings["before"].samples),
        "peak_extra_bytes": {state: peak.bytes for state, peak in peaks.items()},
        "peak_extra_method": {state: peak.method for state, peak in peaks.items()},
        **codes,
    }


def table(cases: list[dict[str, Any]]) -> Table:
    """One line a model and thread count."""
    headings = ("model", "threads", "step before", "after", "times as fast", "peak before", "after", "codes differ*")
    made = Table(*headings)
    made.columns[0].no_wrap = True
    for case in cases:
        milliseconds = [f"{case['step_ms'][state]:.0f} ms" for state in STATES]
        peaks = [case["peak_extra_bytes"][state] for state in STATES]
        megabytes = ["-" if peak is None else f"{peak / 2**20:.0f} MB" for peak in peaks]
        farther = f"{case['codes_that_differ']} of {case['tokens']} ({case['peers_code_farther']})"
        ratio = f"{case['times_as_fast']:.1f}"
        made.add_row(case["model"], str(case["threads"]), *milliseconds, ratio, *megabytes, farther)
    made.caption = "* in brackets: of those, the peer's code is farther in float64"
    return made


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="timing, for each model and number of threads")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*json.loads(options.child))
        return
    document = new_document([])
    document["cases"] = [run_case(case, threads, options.seconds) for case in CASES for threads in options.threads]
    Console(width=110).print(table(document["cases"]))
    if options.json:
        write_json(document, options.json)


if __name__ == "__main__":
    main()

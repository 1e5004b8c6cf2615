"""What the demo measures after training: the quantizer's share of a step, and `nearest` beside torch."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.benchmarks.compare import SearchRow, compare_search
from vqkernels.benchmarks.runner import measure, ratios
from vqkernels.models import VQVAE, Evaluation, ImageFolder, TrainConfig

# A codebook of today's image tokenizers; N tokens are 16 images of 16 x 16 codes
LARGER_SHAPE = (4096, 16384, 32)  # N, K, D
CHECKED_TOKENS = 1024


@dataclass(frozen=True)
class Search:
    """One comparison."""

    title: str
    rows: list[SearchRow]


@dataclass(frozen=True)
class Measurements:
    """Everything that is timed."""

    quantizer_share: float  # of a training step, 0 to 1
    searches: list[Search]


def _batch(config: TrainConfig) -> Tensor:  # [B, 3, S, S]
    """The crops of a first training step."""
    folder = ImageFolder(config.data, config.image_size, seed=config.seed, min_crop=config.min_crop)
    images = torch.stack([folder[divmod(place, len(folder))] for place in range(config.batch_size)]).to(config.device)
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images


def _step_share(model: VQVAE, config: TrainConfig, seconds: float) -> float:
    """The quantizer alone, on its tokens and with its codebook update, over forward and backward of the whole model.

    In turns, and the median of each round's ratio: two numbers from different moments do not make a share.
    """
    images, device = _batch(config), config.device
    whole, alone = (copy.deepcopy(model).train().requires_grad_(True) for _ in range(2))
    dtype = torch.float16 if config.mixed_precision == "fp16" else torch.bfloat16

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype=dtype, enabled=config.mixed_precision != "no")

    with torch.no_grad(), autocast():
        tokens = model.encoder(images).float()

    def step() -> None:
        with autocast():
            out = whole(images)
        ((out.reconstruction.float() - images).abs().mean() + out.quantizer.loss).backward()

    def quantize() -> None:
        out = alone.quantizer(tokens.clone().requires_grad_())
        (out.quantized.square().mean() + out.loss).backward()

    timings = measure({"quantizer": quantize, "step": step}, seconds=seconds, device=device)
    return statistics.median(ratios(timings["quantizer"], timings["step"]))


@torch.no_grad()
def _latents(model: VQVAE, images: Tensor) -> Tensor:  # [N, D]
    """The tokens that the quantizer searches for."""
    tokens = model.encoder(images).float().movedim(1, -1).flatten(0, -2)
    return model.quantizer.project_in(tokens)


def _title(tokens: Tensor, codebook: Tensor, whose: str) -> str:
    return f"nearest on {whose}: N={len(tokens)} tokens, K={len(codebook)} codes, D={tokens.shape[1]}"


def _larger(device: str) -> tuple[Tensor, Tensor]:  # [N, D], [K, D]
    tokens, codes, dim = LARGER_SHAPE
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(tokens + codes, dim, generator=generator).to(device)
    return both[:tokens], both[tokens:]


def measure_demo(
    model: VQVAE,
    config: TrainConfig,
    evaluation: Evaluation,
    *,
    seconds: float,
) -> Measurements:
    """Times what the closing tables show.

    Args:
        model: the trained model, on the device to measure.
        config: what it was trained with.
        evaluation: of the held-out photograph, whose latents are searched for.
        seconds: budget of each of the three timings.
    """
    device = config.device
    own = _latents(model, evaluation.images.to(device)), model.quantizer.codebook.detach()
    searches = []
    for whose, (tokens, codebook) in (("the photograph's own latents", own), ("random data", _larger(device))):
        rows = compare_search(tokens, codebook, seconds, check_rows=CHECKED_TOKENS)
        searches.append(Search(_title(tokens, codebook, whose), rows))
    return Measurements(_step_share(model, config, seconds), searches)

"""The quantizer that a config names, and what the models, their log and their pictures ask of any of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TypeAlias

import torch
from torch import Tensor

from vqkernels.nn import (
    Codebook,
    EntropyOptions,
    IndexPropagationQuantizer,
    LookupFreeQuantizer,
    QuantizerOutput,
    SamplingOptions,
    VectorQuantizer,
)

from .quantizer_config import AnyQuantizerConfig, EntropyConfig, LookupFreeConfig, VectorQuantizerConfig

Quantizer: TypeAlias = VectorQuantizer | IndexPropagationQuantizer | LookupFreeQuantizer

FIGURES = ("commitment_loss", "perplexity", "usage")
ENTROPY_FIGURES = ("entropy_loss", "token_entropy", "batch_entropy")  # of those whose loss has an entropy term


def make_quantizer(config: AnyQuantizerConfig, dim: int, codebook_dim: int | None) -> Quantizer:
    """The quantizer of a channels-first map of `dim` channels.

    Raises:
        ValueError: an option that the quantizer refuses, named as the module's argument.
    """
    if isinstance(config, LookupFreeConfig):
        return LookupFreeQuantizer(
            dim,
            codebook_dim=config.codebook_dim,
            channels="first",
            spherical=config.spherical,
            code_scale=config.code_scale,
            group_size=config.group_size,
            commitment_weight=config.commitment_weight,
            entropy=_entropy_options(config.entropy),
        )
    if config.gradient == "index_propagation":
        return IndexPropagationQuantizer(
            dim,
            config.codebook_size,
            codebook_dim=codebook_dim,
            metric=config.metric,
            channels="first",
            commitment_weight=config.commitment_weight,
            codebook_weight=config.codebook_weight,
            entropy=_entropy_options(config.entropy),
        )
    return _vector_quantizer(config, dim, codebook_dim)


def _vector_quantizer(config: VectorQuantizerConfig, dim: int, codebook_dim: int | None) -> VectorQuantizer:
    return VectorQuantizer(
        dim,
        config.codebook_size,
        codebook_dim=codebook_dim,
        metric=config.metric,
        channels="first",
        update=config.update,
        ema_decay=config.ema_decay,
        commitment_weight=config.commitment_weight,
        codebook_weight=config.codebook_weight,
        gradient=config.gradient,
        # revival places codes by their moving averages
        dead_code_threshold=config.dead_code_threshold if config.update == "ema" else 0.0,
        kmeans_init=config.kmeans_init,
        precision=config.precision,
        entropy=_entropy_options(config.entropy) if config.entropy.weight else None,
        sampling=SamplingOptions(config.sampling_temperature) if config.sampling_temperature else None,
    )


def _entropy_options(config: EntropyConfig) -> EntropyOptions:
    return EntropyOptions(**asdict(config))


def figure_names(config: AnyQuantizerConfig) -> tuple[str, ...]:
    """What the training log tells of a quantizer: tensors of its output, by their names there."""
    return (*FIGURES, *ENTROPY_FIGURES) if config.entropy.weight else FIGURES


def figures(
    out: QuantizerOutput,
    config: AnyQuantizerConfig,
) -> tuple[Tensor, ...]:  # [] each
    """As `figure_names`."""
    return tuple(getattr(out, name) for name in figure_names(config))


def check_codes(
    codes: Tensor,  # [B, h, w]
    size: int,
    name: str = "codes",
) -> Tensor:  # int64 [B, h, w]
    """The codes as int64.

    Raises:
        ValueError: no integers of shape [B, h, w], or out of range.
    """
    if codes.dim() != 3 or codes.is_floating_point() or codes.dtype is torch.bool:
        raise ValueError(f"{name} must be integers of shape [B, h, w], got {codes.dtype} {list(codes.shape)}")
    codes = codes.long()
    looking = not torch.compiler.is_compiling() and codes.numel()  # a graph cannot; lookup complains when it runs
    if looking and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"{name} must lie in [0, {size - 1}], got {int(codes.min())} to {int(codes.max())}")
    return codes


@torch.no_grad()
def code_table(
    quantizer: Quantizer,
    codes: Tensor,  # int64 [B, h, w]
) -> tuple[Tensor, Tensor]:  # int64 [B, h, w] rows of the table, [K, D] the table; both on the CPU
    """Codes and the vectors that they stand for, by which pictures colour them.

    The table is the codebook; where there is none, it has what the decoder is given for each code that occurs.
    """
    if isinstance(quantizer, Codebook):
        return codes.cpu(), quantizer.codebook.detach().float().cpu()
    found, places = codes.unique(return_inverse=True)
    return places.cpu(), quantizer.lookup(found[None])[0].T.float().cpu()

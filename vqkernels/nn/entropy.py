"""What the quantizers with an entropy loss share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._logits import check_temperature
from ..ops.entropy_loss import EntropyLoss, check_loss_arguments
from .output import QuantizerOutput


@dataclass(frozen=True)
class EntropyOptions:
    """The entropy term of a quantizer's loss: ``weight`` times that of ``vqkernels.entropy_loss``."""

    weight: float = 0.1
    temperature: float = 0.01
    token_weight: float = 1.0
    batch_weight: float = 1.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_loss_arguments(self.token_weight, self.batch_weight, self.eps)
        if not self.weight >= 0:
            raise ValueError(f"weight: expected >= 0, got {self.weight}")
        check_temperature(self.temperature)

    def of_loss(self) -> dict[str, float]:
        """The arguments of the loss functions."""
        return {
            "temperature": self.temperature,
            "token_weight": self.token_weight,
            "batch_weight": self.batch_weight,
            "eps": self.eps,
        }


@dataclass(frozen=True, eq=False)
class EntropyQuantizerOutput(QuantizerOutput):
    """``QuantizerOutput`` of a quantizer with an entropy loss, which is part of ``loss``."""

    entropy_loss: Tensor  # [] unweighted; 0 in eval and with weight 0, where it is not computed
    token_entropy: Tensor  # [] nats, mean over tokens; likewise
    batch_entropy: Tensor  # [] nats; likewise


torch.export.register_dataclass(EntropyQuantizerOutput, serialized_type_name="vqkernels.nn.EntropyQuantizerOutput")


def no_entropy(like: Tensor) -> EntropyLoss:
    """Zeros in the place of an entropy loss."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return EntropyLoss(zero, zero.clone(), zero.clone())

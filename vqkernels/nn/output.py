"""What a quantizer returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizerOutput:
    """Unpacks into three: ``quantized, codes, loss = vq(x)``; the rest is read by name.

    All of them are tensors on x's device; reading one as a Python number waits for the device, nothing else does.
    ``quantized`` and the losses are differentiable.
    """

    quantized: Tensor  # x's shape, dtype and layout; NaN where a token is not finite, 0 where it is masked
    codes: Tensor  # int64, x's shape without its channel axis; -1 where a token is masked or not finite
    loss: Tensor  # [] the weighted sum of the losses below and of those that a module adds (entropy, propagation)
    commitment_loss: Tensor  # [] mean of (sg(code) - token)^2: pulls the encoder towards the codes
    codebook_loss: Tensor  # [] mean of (code - sg(token))^2: pulls the codes; 0 for an EMA codebook
    perplexity: Tensor  # [] exp(entropy of the code frequencies), 1 (one code) to codebook_size (all alike)
    usage: Tensor  # [] share of the codebook in use, 0 to 1
    non_finite: Tensor  # int64 [] tokens of this call with NaN or Inf; masked ones are not counted

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.quantized, self.codes, self.loss))

    def __getitem__(self, index: int) -> Tensor:
        return (self.quantized, self.codes, self.loss)[index]


# its tensors are leaves for pytree users: export (also into a file), checkpoint, maps
torch.export.register_dataclass(QuantizerOutput, serialized_type_name="vqkernels.nn.QuantizerOutput")

"""What a training run does about a loss or gradient that is NaN or infinite: leave the step out, or stop and say so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.nn.distributed import all_reduce_packed

from .config import TrainConfig


class NonFiniteLossError(ValueError):
    """The loss or its gradient became NaN or infinite."""


class FiniteGuard:
    """Watches the losses and the gradient's norm of every step.

    Args:
        config: of the run; `max_skipped_steps` says how many steps may be left out.
        names: of what it is shown, for its messages; the last is the gradient's norm.
        scaler: of fp16 training, which skips steps with infinite gradients by itself; None in other formats.
        device: of the run. On a CPU a bad step is found before the optimizer takes it; on a GPU one step later, so
            that no step waits for the device.
    """

    def __init__(self, config: TrainConfig, names: Sequence[str], scaler: Any, device: torch.device) -> None:
        self.config, self.names, self.scaler, self.device = config, names, scaler, device
        self.skipped = 0
        self._unchecked: tuple[int, Tensor] | None = None

    def leaves_out(
        self,
        step: int,
        values: Tensor,  # as `names`
    ) -> bool:
        """Whether this step is one of those that may be skipped; the same on all processes. Waits for the device."""
        if self.skipped >= self.config.max_skipped_steps:
            return False
        judged = values if self.scaler is None else values[:-1]  # fp16: the scaler answers for grad_norm, the last
        (broken,) = all_reduce_packed((~judged.isfinite().all()).float())
        if not broken.item():
            return False
        if self.scaler is not None:
            self.scaler.update()  # else it would not unscale the next step's gradients, as it has done so with these
        self.skipped += 1
        most = f"{self.skipped} of at most {self.config.max_skipped_steps}"
        warnings.warn(f"step {step + 1} was left out, its loss or gradient is not finite: {most}", stacklevel=3)
        return True

    def check(
        self,
        step: int,
        values: Tensor,  # as `names`
    ) -> None:
        """Takes the values of a step that is about to be made.

        Raises:
            NonFiniteLossError: they are not finite, or on a GPU those of the step before.
        """
        previous, self._unchecked = self._unchecked, (step + 1, values)
        if self.device.type == "cpu":
            self.check_now()
        elif previous is not None:
            self._raise_unless_finite(*previous)

    def check_now(self) -> None:
        """Looks at what it was shown last, as before a checkpoint.

        Raises:
            NonFiniteLossError: it is not finite.
        """
        if self._unchecked is not None:
            self._raise_unless_finite(*self._unchecked)
            self._unchecked = None

    def _raise_unless_finite(
        self,
        step: int,
        values: Tensor,  # as `names`
    ) -> None:
        found = dict(zip(self.names, values.tolist(), strict=True))
        if self.scaler is not None:  # fp16: the scaler skips such steps by itself
            found.pop("grad_norm")
        if all(map(math.isfinite, found.values())):
            return
        named = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        raise NonFiniteLossError(
            f"step {step}: the loss or its gradient is not finite ({named}); the checkpoints before it are intact, "
            f"and a learning_rate below {self.config.learning_rate:g} may help"
        )

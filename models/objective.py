"""What a training run minimises: reconstruction and quantizer, and from a step on a discriminator against them.

    autoencoder     l1 + l2 + perceptual + logit distance + bottleneck + w adversarial
    discriminator   adversarial' + lecam + r1 + bcr                              (Esser et al. 2021, eq. 4 to 7)

Both come from one forward of the autoencoder; the discriminator learns from its reconstructions of that step.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adversarial import (
    LastLayer,
    LeCam,
    balance,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from .augmentation import AUGMENTATIONS, augment
from .config import TrainConfig
from .dino_discriminator import DinoDiscriminator
from .discriminator import ActNorm, make_discriminator
from .image_model import ImageModel, ModelOutput
from .layers import widened
from .logit_distance import LogitDistance, make_logit_distance
from .perceptual import PerceptualDistance
from .sharding import reduce_whole_gradients

# of every run, in this order, then the model's `figure_names`, then those of a discriminator
RECONSTRUCTION_PARTS = ("l1", "mse", "perceptual", "logit_distance")
PARTS = ("loss", *RECONSTRUCTION_PARTS)
ADVERSARIAL_PARTS = ("adversarial_loss", "adaptive_weight", "discriminator_loss", "real_logit", "fake_logit")


class Critic:
    """A discriminator with its optimizer and regularisers. Its state is that of a checkpoint."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config.discriminator
        self.accumulation, self.max_grad_norm = config.gradient_accumulation, config.max_grad_norm
        self.network = make_discriminator(self.config, config.image_size).to(device)
        self.lecam = LeCam().to(device)
        self.peak_rate = self.config.learning_rate or config.learning_rate
        self.relative_rate = self.peak_rate / config.learning_rate
        first, second = config.betas
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.peak_rate, betas=(first, second), weight_decay=0.0
        )

    def opinion(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> Tensor:  # [B, ...] logits
        """Of augmented images."""
        return widened(self.network(augment(images, self.config.augmentation)))

    def learn(
        self,
        images: Tensor,  # [B, 3, H, W] real
        reconstructions: Tensor,  # [B, 3, H, W]
        precision: AbstractContextManager[Any],
    ) -> Tensor:  # [3] loss, mean logit of real images, of reconstructions
        """Adds the gradient of one micro-batch to the network's."""
        with precision:
            real, fake = self.opinion(images), self.opinion(reconstructions.detach())
            consistency = self._consistency(real, images, self.config.bcr_real_weight)
            consistency = consistency + self._consistency(fake, reconstructions.detach(), self.config.bcr_fake_weight)
        loss = discriminator_loss(self.config.loss, real, fake) + consistency
        if self.config.lecam_weight:
            loss = loss + self.config.lecam_weight * self.lecam(real, fake)
        if self.config.r1_weight:
            loss = loss + self.config.r1_weight * gradient_penalty(self.opinion, images)
        (loss / self.accumulation).backward()
        return torch.stack([loss.detach(), real.detach().mean(), fake.detach().mean()])

    def _consistency(
        self,
        logits: Tensor,  # [B, ...]
        images: Tensor,  # [B, 3, H, W] that these are of
        weight: float,
    ) -> Tensor | float:  # []
        """Between the logits of images and of the same under every augmentation."""
        if not weight:
            return 0.0
        return weight * consistency_loss(logits, widened(self.network(augment(images, AUGMENTATIONS))))

    def step(self, autoencoder_rate: float) -> None:
        """One step of the optimizer with the mean gradient of all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = autoencoder_rate * self.relative_rate
        parameters = list(self.network.parameters())
        reduce_whole_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def leave_out(self) -> None:
        """Instead of a step: drops the gradients, and what a first batch that was not finite has begun."""
        self.optimizer.zero_grad()
        for module in self.network.modules():
            if isinstance(module, ActNorm):
                module.look_again()

    def state_dict(self) -> dict[str, Any]:
        """Everything that its next step follows from."""
        parts = (self.network, self.lecam, self.optimizer)
        return dict(zip(("network", "lecam", "optimizer"), (part.state_dict() for part in parts), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of ``state_dict``."""
        self.network.load_state_dict(state["network"])
        self.lecam.load_state_dict(state["lecam"])
        self.optimizer.load_state_dict(state["optimizer"])


class Objective:
    """The losses of a run and their backward pass.

    Args:
        config: of the run.
        model: the autoencoder, not wrapped.
        accelerator: of the run: its precision and its backward.
    """

    def __init__(self, config: TrainConfig, model: ImageModel, accelerator: Any) -> None:
        self.config, self.model, self.accelerator = config, model, accelerator
        device = accelerator.device
        self.perceptual: PerceptualDistance | None = None
        if config.perceptual_weight:
            self.perceptual = PerceptualDistance(config.vgg, config.lpips).to(device)
        self.logit_distance: LogitDistance | None = None
        if config.logit_weight:
            self.logit_distance = make_logit_distance(config.logit_network, config.logit_weights_file).to(device)
        self.critic: Critic | None = None
        if config.discriminator.kind != "none":
            self.critic = Critic(config, device)
            self.last = LastLayer(model.last_layer)
        self.is_perceptual, self.is_adversarial = True, self.critic is not None
        self.names = (*PARTS, *model.figure_names, *(() if self.critic is None else ADVERSARIAL_PARTS))

    def begin(self, step: int, share: float) -> bool:
        """Says which losses the next step has; returns whether that changes them.

        Args:
            step: its number, from 0.
            share: how much of the run is done, 0 to 1; the same on all processes.
        """
        settings, before = self.config.discriminator, (self.is_perceptual, self.is_adversarial)
        self.is_perceptual = share >= self.config.perceptual_start
        begun = step >= settings.start_step and share >= settings.start_share
        self.is_adversarial = self.critic is not None and begun
        return before != (self.is_perceptual, self.is_adversarial)

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.config.mixed_precision == "no" else self.accelerator.autocast()

    def networks(self) -> dict[str, str]:
        """What the judging networks of this run may be called, by the figure that they give."""
        judges: dict[str, Any] = {"perceptual": self.perceptual, "logit_distance": self.logit_distance}
        if self.critic is not None and isinstance(self.critic.network, DinoDiscriminator):
            judges["discriminator"] = self.critic.network
        return {name: judge.label for name, judge in judges.items() if judge is not None}

    def _distance(
        self,
        distance: nn.Module | None,
        images: Tensor,  # [B, 3, S, S]
        out: ModelOutput,
    ) -> Tensor:  # []
        """Mean over the batch; 0 where the run has no such loss, or not yet."""
        if distance is None or not self.is_perceptual:
            return images.new_zeros(())
        with self._precision():
            return widened(distance(images, widened(out.reconstruction)).mean())

    def backward(
        self,
        images: Tensor,  # [B, 3, S, S]
        out: ModelOutput,
    ) -> Tensor:  # as `names`
        """Adds the gradients of one micro-batch, the discriminator's too; returns the losses."""
        error = widened(out.reconstruction) - images
        l1, mse = error.abs().mean(), error.square().mean()
        perceptual = self._distance(self.perceptual, images, out)
        logits = self._distance(self.logit_distance, images, out)
        config = self.config
        reconstruction = config.l1_weight * l1 + config.l2_weight * mse + config.perceptual_weight * perceptual
        reconstruction = reconstruction + config.logit_weight * logits
        adversarial = self._adversarial_backward(images, out, reconstruction)
        loss = reconstruction + out.loss
        parts = [loss, l1, mse, perceptual, logits, *self.model.figures(out)]
        values = torch.stack([part.detach().to(loss.dtype) for part in parts])
        if self.critic is None:
            return values
        values[0] += adversarial[0] * adversarial[1]
        return torch.cat([values, adversarial])

    def _adversarial_backward(
        self, images: Tensor, out: ModelOutput, reconstruction: Tensor
    ) -> Tensor:  # [5] as ADVERSARIAL_PARTS
        divisor = self.config.gradient_accumulation
        if self.critic is None or not self.is_adversarial:
            self.accelerator.backward((reconstruction + out.loss) / divisor)
            if self.critic is not None:
                self.last.release()
            return reconstruction.new_zeros(len(ADVERSARIAL_PARTS))
        settings = self.config.discriminator
        with self._precision():
            opinion = self.critic.opinion(widened(out.reconstruction))
        adversarial = generator_loss(settings.loss, opinion)
        found = balance(self.last, reconstruction, adversarial, weight=settings.weight, adaptive=settings.adaptive)
        assert self.last.output is not None
        # a number whose gradient for the last layer's output is that of the whole loss: what goes on from there is
        # an ordinary backward, with DistributedDataParallel's hooks
        stand_in = (widened(self.last.output) * widened(found.gradient)).sum()
        self.accelerator.backward((stand_in + out.loss) / divisor)
        self.last.release()
        learned = self.critic.learn(images, widened(out.reconstruction), self._precision())
        return torch.cat([torch.stack([adversarial.detach(), found.adaptive_weight]), learned])

    def step(self, rate: float) -> None:
        """The discriminator's optimizer, after the autoencoder's."""
        if self.critic is not None and self.is_adversarial:
            self.critic.step(rate)

    def zero_grad(self) -> None:
        """Drops the discriminator's gradients of a step that is left out."""
        if self.critic is not None:
            self.critic.leave_out()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {} if self.critic is None else self.critic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of ``state_dict``.

        Raises:
            ValueError: the checkpoint was written with a discriminator and this run has none, or the reverse.
        """
        if bool(state) != (self.critic is not None):
            had = "a" if state else "no"
            raise ValueError(
                f"discriminator.kind is {self.config.discriminator.kind}, but the run had {had} discriminator"
            )
        if self.critic is not None:
            self.critic.load_state_dict(state)

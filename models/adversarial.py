"""What a discriminator and an autoencoder minimise against each other, and how the two losses are balanced.

With r, f the logits of real and reconstructed images, means over all logits:

              discriminator                                  autoencoder
hinge         (relu(1 - r) + relu(1 + f)) / 2                -f                (Lim & Ye 2017, "Geometric GAN")
vanilla       (softplus(-r) + softplus(f)) / 2               -f                (the pair that VQGAN calls vanilla)
non_saturating softplus(-r) + softplus(f)                    softplus(-f)      (Goodfellow et al. 2014, sec. 3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

LARGEST_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPSILON = 1e-4


def discriminator_loss(
    loss: str,
    real: Tensor,  # [...] logits of real images
    fake: Tensor,  # [...] logits of reconstructions
) -> Tensor:  # []
    """What the discriminator minimises.

    Args:
        loss: "hinge", "vanilla" or "non_saturating".

    Raises:
        ValueError: a loss of another name.
    """
    if loss == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if loss in ("vanilla", "non_saturating"):
        both = F.softplus(-real).mean() + F.softplus(fake).mean()
        return both if loss == "non_saturating" else 0.5 * both
    raise ValueError(f"loss must be 'hinge', 'vanilla' or 'non_saturating', got {loss!r}")


def generator_loss(
    loss: str,
    fake: Tensor,  # [...] logits of reconstructions
) -> Tensor:  # []
    """What the autoencoder minimises of the discriminator's opinion.

    Raises:
        ValueError: a loss of another name than in ``discriminator_loss``.
    """
    if loss in ("hinge", "vanilla"):
        return -fake.mean()
    if loss == "non_saturating":
        return F.softplus(-fake).mean()
    raise ValueError(f"loss must be 'hinge', 'vanilla' or 'non_saturating', got {loss!r}")


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    images: Tensor,  # [B, 3, H, W] real
) -> Tensor:  # []
    """R1: half the mean over images of |d (sum of logits) / d image|^2 (Mescheder et al. 2018, eq. 9, gamma = 1).

    Differentiable with respect to the discriminator's weights.
    """
    images = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return 0.5 * slope.square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """Keeps the discriminator's logits near a moving average of the opposite ones (Tseng et al. 2021, eq. 5).

        mean relu(r - average_f)^2 + mean relu(average_r - f)^2

    The averages are buffers, so that a resumed run has them. The first call takes its own means.
    """

    average_real: Tensor  # []
    average_fake: Tensor  # []
    started: Tensor  # bool []

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("average_real", torch.zeros(()))
        self.register_buffer("average_fake", torch.zeros(()))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def _follow(self, average: Tensor, now: Tensor) -> None:
        """Without waiting for the device."""
        moved = torch.where(self.started, self.decay * average + (1 - self.decay) * now, now)
        average.copy_(moved)

    def forward(
        self,
        real: Tensor,  # [...] logits of real images
        fake: Tensor,  # [...] logits of reconstructions
    ) -> Tensor:  # []
        """The penalty, after the averages have moved to these logits."""
        self._follow(self.average_real, real.mean())
        self._follow(self.average_fake, fake.mean())
        self.started.fill_(True)
        return F.relu(real - self.average_fake).square().mean() + F.relu(self.average_real - fake).square().mean()


class Balanced(NamedTuple):
    """The gradient that an autoencoder's decoder is sent, and how it came about."""

    gradient: Tensor  # [B, 3, H, W] of the whole loss with respect to the reconstruction
    adaptive_weight: Tensor  # [] what the adversarial loss was multiplied with, `weight` included


def balance(
    reconstruction: Tensor,  # [B, 3, H, W], of the last convolution
    reconstruction_loss: Tensor,  # []
    adversarial_loss: Tensor,  # []
    *,
    weight: float,
    last: nn.Conv2d,
    last_input: Tensor,  # [B, C, H, W], what the last convolution was given
    adaptive: bool = True,
) -> Balanced:
    """d (reconstruction_loss + w adversarial_loss) / d reconstruction, w the adaptive weight of VQGAN.

        w = weight * clamp(|g_rec| / (|g_adv| + 1e-4), 0, 1e4)         (Esser et al. 2021, eq. 7)

    g_rec and g_adv are the two losses' gradients for the weights of the decoder's last layer. Both follow from the
    gradients for the reconstruction, which the backward pass needs anyhow: VGG and discriminator are passed once, where
    the published form passes them twice. Call ``reconstruction.backward(gradient)`` then (with what else there is).

    Args:
        weight: factor on the adversarial loss.
        last, last_input: the convolution that made the reconstruction, and its input.
        adaptive: without it, w = weight.
    """
    (d_reconstruction,) = torch.autograd.grad(reconstruction_loss, reconstruction, retain_graph=False)
    (d_adversarial,) = torch.autograd.grad(adversarial_loss, reconstruction, retain_graph=False)
    w = reconstruction.new_full((), weight, dtype=torch.float32)
    if adaptive:
        own, other = (_weight_gradient(last, last_input, each) for each in (d_reconstruction, d_adversarial))
        ratio = own.norm() / (other.norm() + ADAPTIVE_EPSILON)
        w = w * ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).detach()
    return Balanced(d_reconstruction + w.to(d_adversarial.dtype) * d_adversarial, w)


@torch.no_grad()
def _weight_gradient(
    last: nn.Conv2d,
    last_input: Tensor,  # [B, C, H, W]
    gradient: Tensor,  # [B, 3, H, W]
) -> Tensor:  # as last.weight, float32
    return conv2d_weight(
        last_input.detach().float(),
        last.weight.shape,
        gradient.float(),
        stride=last.stride,  # type: ignore[arg-type]
        padding=last.padding,  # type: ignore[arg-type]
        dilation=last.dilation,  # type: ignore[arg-type]
        groups=last.groups,
    )

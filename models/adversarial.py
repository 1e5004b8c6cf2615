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

from vqkernels.nn.distributed import all_reduce_packed, rank_and_world

from .layers import widened

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


def consistency_loss(
    logits: Tensor,  # [...]
    augmented: Tensor,  # [...] of the same images, augmented
) -> Tensor:  # []
    """Their mean squared difference (Zhao et al. 2021, "Improved Consistency Regularization for GANs", alg. 1).

    bCR, balanced consistency, has one of real and one of generated images.
    """
    return (logits - augmented).square().mean()


class LeCam(nn.Module):
    """Keeps the discriminator's logits near a moving average of the opposite ones (Tseng et al. 2021, eq. 5).

        mean relu(r - average_f)^2 + mean relu(average_r - f)^2

    The averages are buffers, so that a resumed run has them, and of all ranks' logits: every rank must call this. The
    first call takes its own means; logits that are not finite move nothing.
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
    def _follow(
        self,
        real: Tensor,  # []
        fake: Tensor,  # []
    ) -> None:
        """Without waiting for the device."""
        world = rank_and_world()[1]
        means = [total / world for total in all_reduce_packed(real, fake)]
        finite = torch.stack(means).isfinite().all()
        for average, now in zip((self.average_real, self.average_fake), means, strict=True):
            moved = torch.where(self.started, self.decay * average + (1 - self.decay) * now, now)
            average.copy_(torch.where(finite, moved, average))
        self.started.logical_or_(finite)

    def forward(
        self,
        real: Tensor,  # [...] logits of real images
        fake: Tensor,  # [...] logits of reconstructions
    ) -> Tensor:  # []
        """The penalty, after the averages have moved to these logits."""
        self._follow(real.mean(), fake.mean())
        return F.relu(real - self.average_fake).square().mean() + F.relu(self.average_real - fake).square().mean()


class LastLayer:
    """What went into a model's last convolution in the newest forward, and what came out."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.convolution = convolution
        self.input: Tensor | None = None  # [B, C, H, W]
        self.output: Tensor | None = None  # [B, C_out, H, W]
        convolution.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.input, self.output = inputs[0].detach(), output

    def release(self) -> None:
        """Lets the tensors go, and the graph that hangs on them."""
        self.input = self.output = None

    def weight_gradient(
        self,
        gradient: Tensor,  # [B, C_out, H, W] for the output
    ) -> Tensor:  # as the convolution's weight, at least float32
        """What ``gradient`` makes of the weights, on this rank."""
        assert self.input is not None
        own = self.convolution
        return conv2d_weight(
            widened(self.input),
            own.weight.shape,
            widened(gradient),
            stride=own.stride,  # type: ignore[arg-type]
            padding=own.padding,  # type: ignore[arg-type]
            dilation=own.dilation,  # type: ignore[arg-type]
            groups=own.groups,
        )


class Balanced(NamedTuple):
    """The gradient that a decoder is sent, and how it came about."""

    gradient: Tensor  # [B, C_out, H, W] of the whole loss for the last layer's output
    adaptive_weight: Tensor  # [] what the adversarial loss was multiplied with, `weight` included


def balance(
    last: LastLayer,
    reconstruction_loss: Tensor,  # []
    adversarial_loss: Tensor,  # []
    *,
    weight: float,
    adaptive: bool = True,
) -> Balanced:
    """d (reconstruction_loss + w adversarial_loss) / d output of the last layer, w the adaptive weight of VQGAN.

        w = weight * clamp(|g_rec| / (|g_adv| + 1e-4), 0, 1e4)         (Esser et al. 2021, eq. 7)

    g_rec and g_adv are the two losses' gradients for the weights of the decoder's last layer. Both follow from the
    gradients for its output, which the backward pass needs anyhow: VGG and discriminator are passed once, where the
    published form passes them twice. They are those of all ranks' batches together, so that w does not depend on how
    a batch is spread; every rank must call this. Then call ``last.output.backward(gradient)``.

    Args:
        last: of the forward that the losses come from.
        weight: factor on the adversarial loss.
        adaptive: without it, w = weight.
    """
    assert last.output is not None
    (d_reconstruction,) = torch.autograd.grad(reconstruction_loss, last.output, retain_graph=True)  # what both share
    (d_adversarial,) = torch.autograd.grad(adversarial_loss, last.output)
    w = widened(last.output.new_full((), weight))
    if adaptive:
        with torch.no_grad():
            own, other = all_reduce_packed(*map(last.weight_gradient, (d_reconstruction, d_adversarial)))
        world = rank_and_world()[1]
        ratio = (own / world).norm() / ((other / world).norm() + ADAPTIVE_EPSILON)
        w = w * ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT)
    return Balanced(d_reconstruction + w.to(d_adversarial.dtype) * d_adversarial, w)

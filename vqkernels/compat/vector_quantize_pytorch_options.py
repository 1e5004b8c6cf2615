"""Which of vector-quantize-pytorch's options an instance uses, and which of those the drop-in has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .ema_codebook import NORM_EPS
from .peer import attribute_refusals, comes_from, is_subclass, tampered

_PACKAGE = "vector_quantize_pytorch"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# what an instance holds, of version 1.32; and its codebook
_ATTRIBUTES = _names(
    "dim heads separate_codebook_per_head project_in project_out has_projections eps has_commitment_loss"
    " commitment_weight commitment_use_cross_entropy_loss learnable_codebook has_codebook_orthogonal_loss"
    " orthogonal_reg_weight orthogonal_reg_active_codes_only orthogonal_reg_max_codes has_codebook_diversity_loss"
    " codebook_diversity_temperature codebook_diversity_loss_weight rotation_trick directional_reparam"
    " directional_reparam_variance route_gradients_to_input sync_update_v use_cosine_sim _codebook"
    " in_place_codebook_optimizer manual_in_place_optimizer_update codebook_size accept_image_fmap accept_3d_fmap"
    " channel_last zero return_zeros_for_masked_padding freeze_codebook"
)
_CODEBOOK_ATTRIBUTES = _names(
    "transform_input decay ema_update manual_ema_update codebook_size num_codebooks kmeans_iters eps"
    " threshold_ema_dead_code has_dead_code_replacement reset_cluster_size gumbel_sample sample_codebook_temp use_ddp"
    " sample_fn replace_sample_fn kmeans_all_reduce_fn all_reduce_fn initted cluster_size embed_avg"
    " learnable_codebook embed use_cosine_sim vq_bridge affine_param sync_affine_param"
)
_AFFINE_ATTRIBUTES = _names(
    "affine_param_batch_decay affine_param_codebook_decay batch_mean batch_variance codebook_mean_needs_init"
    " codebook_mean codebook_variance_needs_init codebook_variance"
)

# constructor argument -> whether the instance uses it, where ours has not
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "heads > 1": lambda vq: vq.heads != 1,
    "separate_codebook_per_head": lambda vq: vq.separate_codebook_per_head,
    "commitment_use_cross_entropy_loss": lambda vq: vq.commitment_use_cross_entropy_loss,
    "orthogonal_reg_weight": lambda vq: vq.has_codebook_orthogonal_loss,
    "codebook_diversity_loss_weight": lambda vq: vq.has_codebook_diversity_loss,
    "stochastic_sample_codes": lambda vq: _sampling(vq)["stochastic"],
    "straight_through with a projection or without route_gradients_to_input": lambda vq: (
        _sampling(vq)["straight_through"] and (vq.has_projections or not vq.route_gradients_to_input)
    ),
    "directional_reparam": lambda vq: vq.directional_reparam,
    "sync_update_v": lambda vq: vq.sync_update_v > 0,
    "vq_bridge": lambda vq: vq._codebook.vq_bridge is not None,
    "in_place_codebook_optimizer": lambda vq: vq.in_place_codebook_optimizer is not None,
    "affine_param": lambda vq: vq._codebook.affine_param,
    "use_cosine_sim with codes that are not of length 1": lambda vq: vq.use_cosine_sim and not _is_normalized(vq),
}
# of a ResidualVQ and the like around it: what would call our modules with options that they have not
_UNSUPPORTED_AROUND = ("beam_size", "eval_beam_size", "implicit_neural_codebook", "shared_codebook", "diveq")


def recognises(module: nn.Module) -> bool:
    """An instance of the class, from the package or a copy of it that keeps its ``_codebook``, or of a subclass."""
    if comes_from(module, "vqkernels") or not isinstance(getattr(module, "_codebook", None), nn.Module):
        return False
    return type(module).__name__ == "VectorQuantize" or is_subclass(module, _PACKAGE, "VectorQuantize")


def refusals(module: nn.Module, around: Sequence[nn.Module] = ()) -> list[str]:
    """Every option that is in the way, by the name of its constructor argument."""
    if is_subclass(module, _PACKAGE, "VectorQuantize"):
        return [f"{type(module).__name__} is a subclass of it"]
    codebook = module.get_submodule("_codebook")
    reasons = attribute_refusals(module, _ATTRIBUTES) + tampered(module)
    reasons += [f"_codebook: {each}" for each in tampered(codebook)]
    reasons += [f"_codebook: {each}" for each in attribute_refusals(codebook, _CODEBOOK_ATTRIBUTES, _AFFINE_ATTRIBUTES)]
    if reasons:
        return reasons
    if not {"stochastic", "straight_through"} <= set(_sampling(module)):
        return ["its gumbel_sample was replaced"]
    used = [name for name, uses in _UNSUPPORTED.items() if uses(module)]
    reasons = [f"option {', '.join(used)}"] if used else []
    for outer in around:
        if comes_from(outer, _PACKAGE):
            asked = [name for name in _UNSUPPORTED_AROUND if getattr(outer, name, None)]
            reasons += [f"{type(outer).__name__} around it has {', '.join(asked)}"] if asked else []
    return reasons


def settings(peer: Any) -> dict[str, Any]:
    """The arguments that make a drop-in like this instance."""
    codebook = peer._codebook
    return {
        "dim": peer.dim,
        "codebook_size": peer.codebook_size,
        "codebook_dim": codebook.embed.shape[-1],
        "decay": codebook.decay,
        "eps": codebook.eps,
        "freeze_codebook": peer.freeze_codebook,
        "kmeans_iters": codebook.kmeans_iters,
        "use_cosine_sim": peer.use_cosine_sim,
        "threshold_ema_dead_code": codebook.threshold_ema_dead_code,
        "channel_last": peer.channel_last,
        "accept_image_fmap": peer.accept_image_fmap,
        "accept_3d_fmap": peer.accept_3d_fmap,
        "commitment_weight": peer.commitment_weight,
        "rotation_trick": peer.rotation_trick,
        "sync_codebook": codebook.use_ddp,
        "ema_update": codebook.ema_update,
        "manual_ema_update": codebook.manual_ema_update,
        "learnable_codebook": codebook.learnable_codebook,
        "return_zeros_for_masked_padding": peer.return_zeros_for_masked_padding,
        "route_gradients_to_input": peer.route_gradients_to_input,
    }


def _sampling(vq: Any) -> dict[str, bool]:
    return getattr(vq._codebook.gumbel_sample, "keywords", {})


def _is_normalized(vq: Any) -> bool:
    """Whether all code rows have length 1, or are yet to be made: the peer multiplies, ours compares angles."""
    codebook = vq._codebook
    if codebook.embed.is_meta or not codebook.initted:
        return True
    length = codebook.embed.detach().double().norm(dim=-1)
    slack = codebook.embed.shape[-1] * torch.finfo(codebook.embed.dtype).eps
    return bool(((length - 1).abs() <= slack + NORM_EPS).all())

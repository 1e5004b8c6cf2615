"""What lies between an encoder and a decoder, as dataclasses of plain types told apart by `kind`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .config_reader import LATER, from_dict

MOST_BITS, MOST_GROUP_BITS = 62, 24  # of vqkernels.nn.LookupFreeQuantizer


@dataclass
class EntropyConfig:
    """An entropy loss over all codes: confident tokens, and a batch spread over the codebook (Yu et al. 2024)."""

    weight: float = 0.1
    """Weight of the whole term in the loss; 0: it is not computed."""
    temperature: float = 0.01
    """Temperature of the softmax over the codes."""
    token_weight: float = 1.0
    """Weight of the part that makes every token choose."""
    batch_weight: float = 1.0
    """Weight of the part that spreads the batch over the codes."""
    eps: float = 0.0
    """What is added inside the logarithm of the batch's entropy; published code has 1e-5."""

    def __post_init__(self) -> None:
        for name in ("weight", "token_weight", "batch_weight", "eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")


def _no_entropy() -> EntropyConfig:
    return EntropyConfig(weight=0.0)


@dataclass
class VectorQuantizerConfig:
    """A codebook of vectors (see vqkernels.nn.VectorQuantizer, and IndexPropagationQuantizer for IBQ)."""

    codebook_size: int = 1024
    """Number of codes K."""
    codebook_dim: int | None = None
    """Dimension of a code; null: the same as latent_channels, otherwise a learned projection lies between."""
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean"
    """What nearest means; dot (the largest product) only with gradient: index_propagation."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: moving averages of its tokens, or the gradient of the codebook loss."""
    ema_decay: float = 0.99
    """Decay of the moving averages per optimizer step."""
    commitment_weight: float = 0.25
    """Weight of the loss that pulls the encoder towards its codes (beta in the papers)."""
    codebook_weight: float = 1.0
    """Weight of the loss that pulls the codes towards the encoder; only with update: gradient."""
    gradient: Literal["straight_through", "rotation", "index_propagation"] = "straight_through"
    """How the gradient passes the quantizer; index_propagation takes it to all codes, as in IBQ (Shi et al. 2024)."""
    dead_code_threshold: float = 0.1
    """A code with fewer tokens per step than this, on average, is placed anew; 0: none. Only with update: ema."""
    kmeans_init: bool = True
    """Take the first codebook from the first training batch by k-means."""
    precision: Literal["exact", "fast"] = "exact"
    """Exact nearest codes, or plain float32 scores."""
    kind: Literal["vq"] = field(default="vq", kw_only=True, metadata=LATER)
    """Tells this config from that of another quantizer."""
    entropy: EntropyConfig = field(default_factory=_no_entropy, kw_only=True, metadata=LATER)
    """An entropy loss over the codebook; none at weight 0, which stands here where the group is left out."""
    sampling_temperature: float = field(default=0.0, kw_only=True, metadata=LATER)
    """Draw the codes of training from the softmax over the codebook at this temperature; 0: the nearest ones."""

    def __post_init__(self) -> None:
        if isinstance(self.entropy, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.entropy = from_dict(EntropyConfig, self.entropy, "entropy")
        if self.gradient == "index_propagation" and self.update != "gradient":
            raise ValueError(f"update must be gradient with gradient: index_propagation, got {self.update}")
        if self.metric == "dot" and self.gradient != "index_propagation":
            raise ValueError(f"gradient must be index_propagation with metric: dot, got {self.gradient}")
        if not self.sampling_temperature >= 0:
            raise ValueError(f"sampling_temperature must be 0 or greater, got {self.sampling_temperature}")
        if self.sampling_temperature and self.gradient == "index_propagation":
            raise ValueError(
                f"sampling_temperature must be 0 with gradient: index_propagation, got {self.sampling_temperature}"
            )


@dataclass
class LookupFreeConfig:
    """Signs instead of a codebook: LFQ, or BSQ with `spherical` (see vqkernels.nn.LookupFreeQuantizer)."""

    kind: Literal["lfq"] = "lfq"
    """Tells this config from that of another quantizer."""
    codebook_dim: int = 18
    """Bits of a code, of which there are 2**codebook_dim; a learned projection lies between where latent_channels
    is another number."""
    spherical: bool = False
    """Bring tokens and codes to length 1 (BSQ: Zhao et al. 2024)."""
    code_scale: float = 1.0
    """Factor of the codes, whose entries are +-1 (+-1/sqrt(codebook_dim) with `spherical`)."""
    group_size: int | None = None
    """Bits of a group, for which the batch's entropy, usage and perplexity are taken; a divisor of codebook_dim of
    at most 24. null: all bits at once."""
    commitment_weight: float = 0.25
    """Weight of the loss that pulls the encoder towards its codes."""
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    """The entropy loss, without which few of the codes come into use; none at weight 0."""

    def __post_init__(self) -> None:
        if isinstance(self.entropy, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.entropy = from_dict(EntropyConfig, self.entropy, "entropy")
        if not 1 <= self.codebook_dim <= MOST_BITS:
            raise ValueError(f"codebook_dim must lie in [1, {MOST_BITS}], got {self.codebook_dim}")
        bits = self.codebook_dim if self.group_size is None else self.group_size
        if not 1 <= bits <= MOST_GROUP_BITS or self.codebook_dim % bits:
            raise ValueError(
                f"group_size must be a divisor of codebook_dim of at most {MOST_GROUP_BITS} (null: all of its bits), "
                f"got {self.group_size} for {self.codebook_dim} bits"
            )
        if not self.code_scale > 0:
            raise ValueError(f"code_scale must be greater than 0, got {self.code_scale}")
        if not self.commitment_weight >= 0:
            raise ValueError(f"commitment_weight must be 0 or greater, got {self.commitment_weight}")

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return 1 << self.codebook_dim


QuantizerConfig = VectorQuantizerConfig  # its name before there was another kind
AnyQuantizerConfig: TypeAlias = VectorQuantizerConfig | LookupFreeConfig  # by `kind`; the first where it is left out

"""What the configs around VQGAN's convolutional encoder and decoder have in common. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DecoderConfig:
    """Shape of VQGAN's decoder; one latent pixel stands for 2**(levels - 1) image pixels each way."""

    kind: str = ""
    """Tells this config from that of another model."""
    out_channels: int = 3
    """Channels of a reconstruction."""
    channels: int = 128
    """Channels after the first convolution (ch)."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of every level as a multiple of `channels` (ch_mult); every level after the first halves the size."""
    blocks: int = 2
    """Residual blocks per level of the encoder (num_res_blocks); the decoder has one more."""
    resolution: int = 256
    """Side of the images that attention_resolutions is counted for; images of other sizes work just as well."""
    attention_resolutions: list[int] | None = field(default_factory=lambda: [16])
    """Sides of the maps with attention after every block (attn_resolutions); null: the last level's, as in LlamaGen."""
    mid_attention: bool = True
    """Attention between the two blocks at the lowest resolution."""
    norm_groups: int = 32
    """Groups of every GroupNorm; divides the channels of every level."""
    latent_channels: int = 256
    """Channels of a latent pixel, which the decoder takes (z_channels)."""
    dropout: float = 0.0
    """Share of the channels' values that a residual block drops in training."""
    gradient_checkpointing: bool = False
    """Compute every level again in the backward pass instead of keeping its insides: slower, and far less memory."""

    def __post_init__(self) -> None:
        for name in ("out_channels", "channels", "blocks", "resolution", "norm_groups", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")
        for width in (self.channels, *self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups must divide channels and channels * channel_multipliers, "
                    f"got {self.norm_groups} for {width} channels"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        self._check_resolutions()

    def _check_resolutions(self) -> None:
        if self.resolution % self.factor:
            raise ValueError(f"resolution must be divisible by the model's factor {self.factor}, got {self.resolution}")
        sides = [self.resolution >> level for level in range(len(self.channel_multipliers))]
        for side in self.attention_resolutions or []:
            if side not in sides:
                raise ValueError(
                    f"attention_resolutions must be sides of the maps ({', '.join(map(str, sides))} for resolution "
                    f"{self.resolution}), got {side}"
                )

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def attention(self) -> list[bool]:
        """Whether the blocks of a level are followed by attention, level by level."""
        levels = range(len(self.channel_multipliers))
        if self.attention_resolutions is None:
            return [level == levels[-1] for level in levels]
        return [self.resolution >> level in self.attention_resolutions for level in levels]


@dataclass
class AutoencoderConfig(DecoderConfig):
    """Shape of VQGAN's encoder and decoder, which have the same levels."""

    in_channels: int = 3
    """Channels of an image."""

    def __post_init__(self) -> None:
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        super().__post_init__()

    @property
    def encoded_channels(self) -> int:
        """Channels that the encoder puts out."""
        return self.latent_channels

"""What can be set: dataclasses of plain types, read from and written to YAML. Imports no torch: --help is quick."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")

CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclass
class QuantizerConfig:
    """The vector quantizer between encoder and decoder (see vqkernels.nn.VectorQuantizer)."""

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

    def __post_init__(self) -> None:
        if self.gradient == "index_propagation" and self.update != "gradient":
            raise ValueError(f"update must be gradient with gradient: index_propagation, got {self.update}")
        if self.metric == "dot" and self.gradient != "index_propagation":
            raise ValueError(f"gradient must be index_propagation with metric: dot, got {self.gradient}")


@dataclass
class VQGANConfig:
    """Shape of a VQGAN (Esser et al. 2021); one token stands for 2**(levels - 1) image pixels each way.

    As the published ones, encoder and decoder have the same levels, and the decoder one more block in each.
    """

    kind: Literal["vqgan"] = "vqgan"
    """Tells this config from that of another model."""
    in_channels: int = 3
    """Channels of an image."""
    out_channels: int = 3
    """Channels of a reconstruction."""
    channels: int = 128
    """Channels after the first convolution (ch)."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of every level as a multiple of `channels` (ch_mult); every level after the first halves the size."""
    blocks: int = 2
    """Residual blocks per level of the encoder (num_res_blocks)."""
    resolution: int = 256
    """Side of the images that attention_resolutions is counted for; images of other sizes work just as well."""
    attention_resolutions: list[int] | None = field(default_factory=lambda: [16])
    """Sides of the maps with attention after every block (attn_resolutions); null: the last level's, as in LlamaGen."""
    mid_attention: bool = True
    """Attention between the two blocks at the lowest resolution."""
    norm_groups: int = 32
    """Groups of every GroupNorm; divides the channels of every level."""
    latent_channels: int = 256
    """Channels that the encoder puts out and the decoder takes (z_channels)."""
    dropout: float = 0.0
    """Share of the channels' values that a residual block drops in training."""
    gradient_checkpointing: bool = False
    """Compute every level again in the backward pass instead of keeping its insides: slower, and far less memory."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The vector quantizer. Its codebook_dim (embed_dim) is that of the 1x1 convolutions around it; null is
    latent_channels."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = from_dict(QuantizerConfig, self.quantizer, "quantizer")
        positive = ("in_channels", "out_channels", "channels", "blocks", "resolution", "norm_groups", "latent_channels")
        for name in positive:
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
        """Image pixels per token, each way."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def codebook_dim(self) -> int:
        """Channels of a token."""
        return self.quantizer.codebook_dim or self.latent_channels

    @property
    def attention(self) -> list[bool]:
        """Whether the blocks of a level are followed by attention, level by level."""
        levels = range(len(self.channel_multipliers))
        if self.attention_resolutions is None:
            return [level == levels[-1] for level in levels]
        return [self.resolution >> level in self.attention_resolutions for level in levels]


@dataclass
class VQVAEConfig:
    """Shape of a VQVAE; one latent pixel stands for patch_size * 2**(levels - 1) image pixels each way."""

    patch_size: int = 1
    """Pixels each way that the first layer folds into channels; 1 is none, 2 or 4 make a model quicker."""
    channels: int = 64
    """Channels at the finest level."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Channels of every level as a multiple of `channels`; every level after the first halves the size."""
    blocks: int = 2
    """Residual blocks per level, in the encoder and in the decoder."""
    group_norm: bool = True
    """GroupNorm before every convolution of a residual block; without it the blocks are quicker on a CPU."""
    latent_channels: int = 32
    """Channels of the tokens that the encoder hands to the quantizer."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The vector quantizer."""

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):  # huggingface_hub restores nested dataclasses as plain dicts
            self.quantizer = from_dict(QuantizerConfig, self.quantizer, "quantizer")
        for name in ("patch_size", "channels", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive integers, got {self.channel_multipliers}")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, each way."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


@dataclass
class DiscriminatorConfig:
    """The network that tells pictures from reconstructions, and what its opinion weighs."""

    kind: Literal["none", "patch", "style"] = "none"
    """patch: one logit per patch, as in VQGAN; style: one per image, as in StyleGAN2 (sides that are powers of two)."""
    channels: int = 64
    """Channels of its first layer."""
    layers: int = 3
    """Strided convolutions of kind patch."""
    norm: Literal["batch", "act"] = "batch"
    """Normalisation of kind patch: batch statistics, or a scale and shift set by the first batch (ActNorm)."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """What the two networks minimise."""
    start_step: int = 0
    """Steps before it takes part; until then it is neither run nor trained."""
    learning_rate: float | None = None
    """Largest learning rate of its optimizer; null: that of the autoencoder."""
    weight: float = 0.8
    """Weight of its loss for the autoencoder; a factor on the adaptive weight where that is on."""
    adaptive: bool = True
    """Weigh its loss so that its gradient at the last layer is as large as the reconstruction's (Esser et al. 2021)."""
    lecam_weight: float = 0.0
    """Weight of the LeCAM regularisation (Tseng et al. 2021); 0.001 to 0.05 where it is used."""
    r1_weight: float = 0.0
    """Weight of the R1 gradient penalty (Mescheder et al. 2018)."""
    augmentation: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """Differentiable augmentations of what it sees (Zhao et al. 2020), against overfitting of small datasets."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("start_step", "weight", "lecam_weight", "r1_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")


@dataclass
class TrainConfig:
    """Everything about one training run; `vqkernels.models.train` takes it, configs/*.yaml are examples."""

    data: str | None = None
    """Folder of images, searched recursively; null uses the photographs bundled with scikit-image."""
    output: str = "runs/vqvae"
    """Folder of the run: config.yaml, checkpoints/, samples/, model/, metrics.jsonl and TensorBoard events."""
    validation: str | None = None
    """Folder of held-out images; null holds out the bundled astronaut when data is null, otherwise nothing."""
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    """The model."""
    image_size: int = 256
    """Side of the square training crops in pixels; divisible by the model's factor."""
    min_crop: float = 0.0
    """Smallest area of a random crop, as a share of the largest square that the picture holds."""
    batch_size: int = 16
    """Crops per process and per micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    steps: int | None = None
    """Optimizer steps; null leaves the end to max_seconds."""
    max_seconds: float | None = None
    """Time budget in seconds, over all resumed parts together; the learning rate falls with the time used."""
    learning_rate: float = 4e-4
    """Largest learning rate of Adam."""
    final_learning_rate: float = 0.02
    """Learning rate at the end, as a share of learning_rate; the cosine ends there."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of Adam's two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error of the reconstruction, in units of [-1, 1]."""
    l2_weight: float = 1.0
    """Weight of the mean squared error of the reconstruction."""
    perceptual_weight: float = 0.0
    """Weight of the distance between the VGG16 features of image and reconstruction (LPIPS)."""
    vgg: str | None = None
    """File with VGG16's weights as torchvision saves them; null: random features, which is not LPIPS."""
    lpips: str | None = None
    """File with LPIPS's linear weights (lin0.model.1.weight ...); needs vgg."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator that makes the run a VQGAN's; kind none: a VQ-VAE."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    max_skipped_steps: int = 0
    """Steps with a loss or gradient that is NaN or infinite which are left out; the next one ends the run."""
    collapse_usage: float = 0.05
    """A warning comes when less than this share of the codebook is in use, from the 200th step on; 0: never."""
    weight_ema_decay: float = 0.999
    """Decay of the moving average of the weights that is saved as the model; 0 saves the last weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Number format of the convolutions; fp16 needs a GPU. Weights and quantizer stay float32."""
    channels_last: bool = True
    """Memory layout of images and weights; quicker for convolutions on CPUs and on tensor cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch per process; null leaves torch's own choice."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""
    cache_mb: int = 1024
    """Memory for decoded pictures, in MiB per process; pictures beyond it are decoded every time."""
    seed: int = 0
    """Seed of weights, order of the images and augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between two validations and pictures in samples/; 0 makes them at the end only."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one is always written at the end."""
    keep_checkpoints: int = 3
    """Checkpoints that are kept; older ones are deleted."""
    trackers: list[str] = field(default_factory=list)
    """More trackers of accelerate beside TensorBoard and metrics.jsonl, for instance wandb or trackio."""
    resume: bool = False
    """Continue the run in `output` at the step after its newest valid checkpoint; begin where there is none."""
    overwrite: bool = False
    """Delete a run that `output` already holds."""

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            self.model = from_dict(VQVAEConfig, self.model, "model")
        if isinstance(self.discriminator, dict):
            self.discriminator = from_dict(DiscriminatorConfig, self.discriminator, "discriminator")
        if self.discriminator.kind != "none" and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision must be bf16 or no with a discriminator, got fp16")
        if self.perceptual_weight < 0:
            raise ValueError(f"perceptual_weight must be 0 or greater, got {self.perceptual_weight}")
        if self.steps is None and self.max_seconds is None:
            self.steps = 10_000
        for name in ("image_size", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.model.factor:
            raise ValueError(
                f"image_size must be divisible by the model's factor {self.model.factor}, got {self.image_size}"
            )
        for name in ("steps", "max_seconds", "learning_rate", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        for name, low, high in (
            *(("min_crop", 0, 1), ("final_learning_rate", 0, 1), ("weight_ema_decay", 0, 1)),
            *(("collapse_usage", 0, 1), ("max_skipped_steps", 0, math.inf)),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {getattr(self, name)}")


def _mismatch(value: Any, expected: str, name: str) -> ValueError:
    return ValueError(f"option {name!r} must be {expected}, got {value!r}")


def _number(value: Any, kind: type, name: str) -> Any:
    """int and float options; YAML reads 1e-3 as text, and true must not pass for 1."""
    if isinstance(value, bool):
        raise _mismatch(value, f"of type {kind.__name__}", name)
    if kind is float and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, int):
        return value
    raise _mismatch(value, f"of type {kind.__name__}", name)


def _convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`, which is a type hint of one of the dataclasses above."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise _mismatch(value, "one of " + ", ".join(map(str, arguments)), name)
        return value
    if type(None) in arguments:
        return None if value is None else _convert(value, arguments[0], name)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise _mismatch(value, "a list", name)
        return [_convert(item, arguments[0], f"{name}[{place}]") for place, item in enumerate(value)]
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, name)
    if kind in (int, float):
        return _number(value, kind, name)
    if not isinstance(value, kind):
        raise _mismatch(value, f"of type {kind.__name__}", name)
    return value


def from_dict(kind: type[Config], values: Any, name: str = "") -> Config:
    """A config dataclass from plain nested dicts, as YAML and JSON give them.

    Args:
        kind: the dataclass.
        values: its options; those left out keep their defaults.
        name: path of these options in the file, for error messages.

    Raises:
        ValueError: an unknown option, or a value of the wrong type; names the option.
    """
    if dataclasses.is_dataclass(values) and isinstance(values, kind):
        return values
    prefix = f"{name}." if name else ""
    if not isinstance(values, dict):
        raise _mismatch(values, "a group of options", name or kind.__name__)
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {prefix + close[0]!r}?" if close else f", expected one of {', '.join(hints)}"
            raise ValueError(f"unknown option {prefix + str(key)!r}{hint}")
    return kind(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path) -> None:
    """Writes a config dataclass as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_config(path: str | Path, kind: type[Config] | None = None) -> Config:
    """Reads a config dataclass from YAML, strictly.

    Args:
        path: a file, or the name of a bundled one: demo, vqvae-f8 or vqvae-f16.
        kind: the dataclass; TrainConfig when None.

    Raises:
        FileNotFoundError: no such file, and no bundled config of that name.
        ValueError: an unknown option, a value of the wrong type or broken YAML; names the file.
    """
    file = Path(path)
    bundled = CONFIG_FOLDER / f"{path}.yaml"
    if not file.is_file():
        if not bundled.is_file():
            names = ", ".join(sorted(each.stem for each in CONFIG_FOLDER.glob("*.yaml")))
            raise FileNotFoundError(f"config {str(path)!r} is neither a file nor a bundled config ({names})")
        file = bundled
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return typing.cast(Config, from_dict(kind or TrainConfig, values))
    except (ValueError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from None

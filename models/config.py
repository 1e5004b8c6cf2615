"""What a training run can be told: dataclasses of plain types, from and to YAML. Imports no torch: --help is quick."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from .config_reader import Config, convert, from_dict, save_config, to_dict
from .model_config import HierarchicalVQVAEConfig, ModelConfig, QuantizerConfig, ViTConfig, VQGANConfig, VQVAEConfig

__all__ = [
    "CONFIG_FOLDER",
    "DiscriminatorConfig",
    "HierarchicalVQVAEConfig",
    "ModelConfig",
    "QuantizerConfig",
    "TrainConfig",
    "VQGANConfig",
    "VQVAEConfig",
    "ViTConfig",
    "from_dict",
    "load_config",
    "save_config",
    "to_dict",
]

CONFIG_FOLDER = Path(__file__).parent / "configs"
DINO_DEPTH = 12  # blocks of its ViT-S


@dataclass
class DiscriminatorConfig:
    """The network that tells pictures from reconstructions, and what its opinion weighs."""

    kind: Literal["none", "patch", "style", "dino"] = "none"
    """patch: one logit per patch, as in VQGAN; style: one per image, as in StyleGAN2 (sides that are powers of two);
    dino: heads on the features of a frozen DINO, as in StyleGAN-T and ImageFolder."""
    channels: int = 64
    """Channels of its first layer."""
    layers: int = 3
    """Strided convolutions of kind patch."""
    norm: Literal["batch", "act"] = "batch"
    """Normalisation of kind patch: batch statistics, or a scale and shift set by the first batch (ActNorm)."""
    backbone: Literal["vit_s16", "vit_s8"] = "vit_s16"
    """Frozen network of kind dino: ViT-S with patches of 16 or 8 pixels."""
    weights_file: str | None = None
    """File with the backbone's weights as DINO's authors publish them; null: random ones, which are not DINO."""
    blocks: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    """Blocks of the backbone, from 0, whose outputs kind dino judges beside the embedded patches."""
    input_side: int = 224
    """Side of the squares that kind dino cuts or resizes what it sees to; a multiple of the patch, from two of them."""
    crop: float = 0.5
    """Probability that kind dino cuts a random square out of larger images rather than resizing them."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """What the two networks minimise."""
    start_step: int = 0
    """Steps before it takes part; until then it is neither run nor trained."""
    start_share: float = 0.0
    """Share of the run before it takes part, in the place of start_step or beside it."""
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
    bcr_real_weight: float = 0.0
    """Weight of the consistency of logits of real images under color, translation and cutout (Zhao et al. 2021)."""
    bcr_fake_weight: float = 0.0
    """The same of reconstructions; balanced consistency regularisation (bCR) has both."""
    augmentation: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """Differentiable augmentations of what it sees (Zhao et al. 2020), against overfitting of small datasets."""

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("start_step", "weight", "lecam_weight", "r1_weight", "bcr_real_weight", "bcr_fake_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must lie in [0, 1), got {self.start_share}")
        self._check_dino()

    def _check_dino(self) -> None:
        patch = int(self.backbone.removeprefix("vit_s"))
        if self.input_side % patch or self.input_side < 2 * patch:
            raise ValueError(
                f"input_side must be a multiple of {self.backbone}'s patch of {patch} pixels, "
                f"from {2 * patch}, got {self.input_side}"
            )
        if len({*self.blocks}) != len(self.blocks) or not {*self.blocks} <= {*range(DINO_DEPTH)}:
            raise ValueError(f"blocks must be distinct numbers from 0 to {DINO_DEPTH - 1}, got {self.blocks}")
        if not 0 <= self.crop <= 1:
            raise ValueError(f"crop must lie in [0, 1], got {self.crop}")
        if self.kind == "dino" and self.r1_weight:
            raise ValueError(
                "r1_weight must be 0 with kind dino, whose logits of an image depend on its neighbours, "
                f"got {self.r1_weight}"
            )
        for name in ("bcr_real_weight", "bcr_fake_weight"):
            if self.kind == "dino" and self.crop and getattr(self, name):
                raise ValueError(
                    f"{name} must be 0 with kind dino and crop above 0, which cuts another square out of each of the "
                    f"images that are compared, got {getattr(self, name)}"
                )
        if self.kind != "dino" and self.weights_file is not None:
            raise ValueError(f"kind must be dino where weights_file is given, got {self.kind}")


@dataclass
class TrainConfig:
    """Everything about one training run; `vqkernels.models.train` takes it, configs/*.yaml are examples."""

    data: str | None = None
    """Folder of images, searched recursively; null uses the photographs bundled with scikit-image."""
    output: str = "runs/vqvae"
    """Folder of the run: config.yaml, checkpoints/, samples/, model/, metrics.jsonl and TensorBoard events."""
    validation: str | None = None
    """Folder of held-out images; null holds out the bundled astronaut when data is null, otherwise nothing."""
    model: ModelConfig = field(default_factory=VQVAEConfig)
    """The model; its kind says which."""
    start_from: str | None = None
    """Folder with a model (of a run, or of vqkernels convert) whose weights and codes the run begins with."""
    image_size: int = 256
    """Side of the square training crops in pixels; divisible by the model's factor."""
    min_crop: float = 0.0
    """Smallest area of a random crop, as a share of the largest square that the picture holds."""
    color_jitter: float = 0.0
    """Strength of random changes of hue, contrast and brightness of the crops, 0 to 1: helps where pictures are few."""
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
    perceptual_start: float = 0.0
    """Share of the run before the perceptual and the logit loss join; until then their networks are not run."""
    vgg: str | None = None
    """File with VGG16's weights as torchvision saves them; null: random features, which is not LPIPS."""
    lpips: str | None = None
    """File with LPIPS's linear weights (lin0.model.1.weight ...); needs vgg."""
    logit_weight: float = 0.0
    """Weight of the mean squared difference between an ImageNet classifier's logits of image and reconstruction."""
    logit_network: Literal["convnext_s", "resnet50"] = "convnext_s"
    """The classifier: convnext_s as in TiTok (weight 0.1 there), resnet50 as in MaskBit's VQGAN+."""
    logit_weights_file: str | None = None
    """File with the classifier's weights as torchvision saves them; null: random ones, which have no such name."""
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
    sharding: Literal["none", "full"] = "none"
    """full: with several processes, each holds a slice of every weight, gradient and moment of Adam (FSDP)."""
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
    deterministic: bool = False
    """Deterministic algorithms of torch alone, also on a GPU: slower, and the same bits in every run with `steps`."""
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
            self.model = convert(self.model, ModelConfig, "model")
        if isinstance(self.discriminator, dict):
            self.discriminator = from_dict(DiscriminatorConfig, self.discriminator, "discriminator")
        if self.discriminator.kind != "none" and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision must be bf16 or no with a discriminator, got fp16")
        if self.sharding == "full" and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision must be bf16 or no with sharding: full, got fp16")
        if self.model.kind == "gan":
            self._check_generator()
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "logit_weight", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or greater, got {getattr(self, name)}")
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
            *(("min_crop", 0, 1), ("color_jitter", 0, 1), ("perceptual_start", 0, 1), ("final_learning_rate", 0, 1)),
            *(("weight_ema_decay", 0, 1), ("collapse_usage", 0, 1), ("max_skipped_steps", 0, math.inf)),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {getattr(self, name)}")

    def _check_generator(self) -> None:
        """A GAN reconstructs nothing: all that it learns from is the discriminator, from the first step on."""
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "logit_weight"):
            if getattr(self, name) != 0:
                raise ValueError(f"{name} must be 0 with model.kind: gan, got {getattr(self, name)}")
        found = self.discriminator
        if found.kind == "none":
            raise ValueError("discriminator.kind must be patch, style or dino with model.kind: gan, got none")
        if found.adaptive:
            raise ValueError("discriminator.adaptive must be false with model.kind: gan, got true")
        for name in ("start_step", "start_share"):
            if getattr(found, name):
                raise ValueError(f"discriminator.{name} must be 0 with model.kind: gan, got {getattr(found, name)}")


def load_config(path: str | Path, kind: type[Config] | None = None) -> Config:
    """Reads a config dataclass from YAML, strictly.

    Args:
        path: a file, or the name of a bundled one in models/configs, such as demo or vqvae-f8.
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

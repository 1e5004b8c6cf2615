"""What an evaluation says: figures with their conventions and errors, code use, examples, and all of it as JSON.

Imports no torch, so that options and conventions are quick to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMAT = "vqkernels evaluation 1"
CURVE_POINTS = 64  # of the code usage curve
PUBLISHED_IMAGES = 50_000  # ImageNet's validation set, which tables of rFID are made with


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated.

    Args:
        image_size: side of the square crops in pixels.
        batch_size: pictures at a time; changes no figure beyond the rounding of the network. A generator draws other
            samples for another one.
        pixels: "uint8" compares what a saved 8-bit picture of the reconstruction holds, as published tables do; "float"
            leaves the network's numbers as they are, clamped to the range.
        vgg, lpips: files with VGG16's weights and LPIPS's linear weights.
        inception: file with the weights of FID's InceptionV3.
        inception_resize: "tensorflow" as torch-fidelity and the original, "pytorch" as pytorch-fid.
        random_features: where a weight file is missing, measure with random features, under a name of its own.
        shown: worst and best pictures that are kept, each.

    Raises:
        ValueError: a number below its range, or lpips without vgg.
    """

    image_size: int = 256
    batch_size: int = 8
    pixels: Literal["uint8", "float"] = "uint8"
    vgg: str | None = None
    lpips: str | None = None
    inception: str | None = None
    inception_resize: Literal["tensorflow", "pytorch"] = "tensorflow"
    random_features: bool = False
    shown: int = 4

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("batch_size", 1), ("shown", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pixels not in ("uint8", "float"):
            raise ValueError(f"pixels must be 'uint8' or 'float', got {self.pixels!r}")
        if self.lpips is not None and self.vgg is None:
            raise ValueError("vgg must be given where lpips is: LPIPS's weights belong to VGG16's features")


class Kind(NamedTuple):
    """A figure: how it is called, and by which convention it is measured."""

    key: str
    label: str
    unit: str
    better: str  # "higher" or "lower"
    digits: int
    convention: str


PSNR = Kind(
    "psnr", "PSNR", "dB", "higher", 2,
    "10 log10(255^2 / MSE) of every picture, its pixels and colours together; the mean of these, not that of the MSE",
)  # fmt: skip
SSIM = Kind(
    "ssim", "SSIM", "", "higher", 4,
    "Gaussian window of 11 pixels, deviation 1.5, K = 0.01 and 0.03, range 255, mirrored border, mean over the colour "
    "channels (torchmetrics); tables that take twice the range come out higher",
)  # fmt: skip
MS_SSIM = Kind(
    "ms_ssim", "MS-SSIM", "", "higher", 4,
    "five scales with the weights of Wang et al. 2003, windows as for SSIM (torchmetrics)",
)  # fmt: skip
L1 = Kind("l1", "L1", "", "lower", 5, "mean absolute difference, of pixels that lie in [0, 1]")

_VGG = "VGG16's five features, images in [-1, 1], "
LPIPS = Kind(
    "lpips", "LPIPS (VGG16)", "", "lower", 4, _VGG + "weighted by LPIPS's linear weights, both from your files"
)
VGG_DISTANCE = Kind(
    "vgg16_distance", "VGG16 features, unweighted (not LPIPS)", "", "lower", 4,
    _VGG + "without LPIPS's linear weights, which were not given",
)  # fmt: skip
RANDOM_PAIRS = Kind(
    "random_feature_distance", "random-feature distance (not LPIPS)", "", "lower", 4,
    "the formula of LPIPS on a VGG16 with random weights; compares with nothing but itself",
)  # fmt: skip

_RESIZES = {
    "tensorflow": "resized to 299 as TensorFlow 1 and torch-fidelity do",
    "pytorch": "resized to 299 as pytorch-fid does",
}
_FID = "2048 features of FID's InceptionV3 from your file, pictures {resize}, covariances with n - 1, float64"
RFID = Kind("rfid", "rFID", "", "lower", 3, "originals against reconstructions: " + _FID)
FID = Kind("fid", "FID", "", "lower", 3, "originals against generated samples: " + _FID)
RANDOM_SETS = Kind(
    "random_inception_distance", "random-feature distance (not FID)", "", "lower", 5,
    "the formula of FID on an InceptionV3 with random weights, pictures {resize}; compares with nothing but itself",
)  # fmt: skip


def pair_kinds(options: EvaluationOptions) -> list[Kind]:
    """The figures of a picture and its reconstruction, each by the name that it may carry."""
    perceptual = LPIPS if options.lpips else VGG_DISTANCE if options.vgg else LPIPS
    if options.vgg is None and options.random_features:
        perceptual = RANDOM_PAIRS
    return [PSNR, SSIM, MS_SSIM, L1, perceptual]


def set_kind(options: EvaluationOptions, *, samples: bool) -> Kind:
    """The figure of two sets of pictures, by the name that it may carry."""
    kind = FID if samples else RFID
    if options.inception is None and options.random_features:
        kind = RANDOM_SETS
    return kind._replace(convention=kind.convention.format(resize=_RESIZES[options.inception_resize]))


@dataclass(frozen=True)
class Figure:
    """A figure over all pictures; its numbers are None where it could not be measured, and `missing` says why."""

    kind: Kind
    value: float | None  # the mean over the pictures, or the distance of the two sets
    images: int
    standard_error: float | None = None  # of the mean: deviation over the root of the number of pictures
    median: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    missing: str = ""

    def text(self) -> str:
        """The value as it is printed, '-' where there is none."""
        return "-" if self.value is None else f"{self.value:.{self.kind.digits}f}"


def mean_figure(kind: Kind, values: Sequence[float], missing: str = "") -> Figure:
    """Summary of one number per picture; PSNR is infinite where the two are equal, and so is its mean then."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if missing or array.size == 0:
        return Figure(kind, None, 0, missing=missing or "no picture")
    error = None
    if array.size > 1 and np.isfinite(array).all():
        error = float(array.std(ddof=1) / math.sqrt(array.size))
    middle, low, high = (float(found) for found in (np.median(array), array.min(), array.max()))
    return Figure(kind, float(array.mean()), array.size, error, middle, low, high)


@dataclass(frozen=True)
class CodeMap:
    """How one map of codes was used over all pictures."""

    rows: int
    columns: int
    codebook_size: int
    tokens: int
    used: int
    usage: float  # used / codebook_size: a code counts that occurs once in all the pictures
    perplexity: float  # exp of the entropy of all tokens together
    entropy_bits: float  # per token
    curve: list[list[float]]  # [share of the codebook, share of the tokens], the most used codes first


def code_map_use(
    counts: np.ndarray,  # [used], of the codes that occurred
    codebook_size: int,
    grid: tuple[int, int],
) -> CodeMap:
    """Usage, perplexity and entropy of counts."""
    import numpy as np

    tokens = int(counts.sum())
    shares = counts / tokens
    entropy = float(-(shares * np.log2(shares)).sum())
    ordered = np.concatenate([[0.0], np.cumsum(np.sort(counts)[::-1]) / tokens])  # [K + 1]
    places = np.linspace(0, 1, CURVE_POINTS + 1) ** 2  # closer where the curve is steep
    curve = np.stack([places, np.interp(places * codebook_size, np.arange(len(ordered)), ordered)], axis=1)
    used = len(shares)
    return CodeMap(*grid, codebook_size, tokens, used, used / codebook_size, 2.0**entropy, entropy, curve.tolist())


@dataclass(frozen=True)
class CodeUse:
    """The codes of all pictures together."""

    maps: list[CodeMap]
    bits_per_pixel: float  # log2 of the codebook's size for every token
    entropy_bits_per_pixel: float  # what an ideal entropy coder without context needs


def code_use(maps: list[CodeMap], image_size: int) -> CodeUse:
    """Bits per pixel of maps that together stand for one square picture."""
    pixels = image_size**2
    fixed = sum(each.rows * each.columns * math.log2(each.codebook_size) for each in maps) / pixels
    entropy = sum(each.rows * each.columns * each.entropy_bits for each in maps) / pixels
    return CodeUse(maps, fixed, entropy)


@dataclass(frozen=True)
class Example:
    """A picture that is kept to be looked at."""

    file: str
    psnr: float
    image: Tensor  # [3, S, S] uint8
    reconstruction: Tensor  # [3, S, S] uint8
    codes: tuple[Tensor, ...]  # int64 [h, w] each, -1 where a token was not finite; none for a model without codes


@dataclass(frozen=True)
class EvaluationReport:
    """All that was measured of a model."""

    options: EvaluationOptions
    model: dict[str, Any]  # class, fingerprint, parameters, factor, config
    figures: dict[str, Figure]
    codes: CodeUse | None  # None where there were none to count
    files: list[str]
    per_image: dict[str, list[float]]  # by figure, in the order of `files`
    skipped: list[tuple[Path, str]]
    warnings: list[str]
    weights: dict[str, dict[str, str]]  # file and SHA-256 of vgg, lpips and inception, where they were given
    device: str
    seconds: float
    worst: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON: numbers that are not finite become null."""
        rows = [
            {"file": file, **{key: values[place] for key, values in self.per_image.items()}}
            for place, file in enumerate(self.files)
        ]
        return _finite(
            {
                "format": FORMAT,
                "model": self.model,
                "images": {"count": len(self.files), "size": self.options.image_size, "crop": CROP},
                "options": asdict(self.options),
                "figures": {key: _figure(figure) for key, figure in self.figures.items()},
                "codes": None if self.codes is None else asdict(self.codes),
                "per_image": rows,
                "skipped": [{"file": str(file), "reason": reason} for file, reason in self.skipped],
                "warnings": self.warnings,
                "weights": self.weights,
                "device": self.device,
                "seconds": self.seconds,
            }
        )


CROP = (
    "the middle of each, scaled so that its shorter side fits: halved by means of 2 x 2 while it is at least twice as "
    "long, then bicubic"
)


def _figure(figure: Figure) -> dict[str, Any]:
    kind = figure.kind
    named = {"label": kind.label, "unit": kind.unit, "better": kind.better, "convention": kind.convention}
    return {**named, **{key: value for key, value in asdict(figure).items() if key != "kind"}}


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

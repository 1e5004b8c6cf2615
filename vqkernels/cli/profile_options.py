"""What `vqkernels profile` can be told. Imports no torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vqkernels.benchmarks.config import Data
from vqkernels.benchmarks.shapes import parse_shape

POSITIVE = ("steps", "seconds", "threads", "entropy_temperature", "sampling_temperature", "kmeans_iterations")


@dataclass
class ProfileConfig:
    """Options"""

    shape: str | None = None
    """N,K,D (tokens, codes, dimensions) or a model's name (vqgan-16384, llamagen, open-magvit2, encodec ...)"""
    data: Data = "normal"
    """what the tokens and codes of --shape are drawn from; see vqkernels bench --help"""
    tokens: str | None = None
    """your own tokens instead, with --codebook: an .npy file [..., D]"""
    codebook: str | None = None
    """your own codes [K, D]: an .npy, .safetensors or .pt file"""
    codebook_name: str | None = None
    """name of the codebook in the .safetensors or .pt file, where more than one array could be it"""
    training: str | None = field(default=None, metadata={"short": "-t", "takes_config": True})
    """YAML file of vqkernels train, or demo, vqvae-f8, vqvae-f16: profiles its training step, and the search on the
    tokens of its own encoder"""
    images: str | None = None
    """folder of images for the training step; the config's own when left out, or else generated pictures"""
    steps: int = 8
    """training steps to time"""
    out: str = field(default="profile", metadata={"short": "-o"})
    """folder for report.html, report.json and trace.json.gz"""
    seconds: float = 10.0
    """time budget of the kernels' timing"""
    threads: int | None = None
    """CPU threads; torch's own number when left out"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """element type of tokens and codes"""
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean"
    """what nearest means, dot (the largest product) only with gradient index_propagation; a training config brings its
    own"""
    precision: Literal["exact", "fast"] = "exact"
    """exact nearest codes, or plain float32 scores; a training config brings its own"""
    gradient: Literal["straight_through", "rotation", "index_propagation"] = "straight_through"
    """how the gradient passes the quantizer, index_propagation: to all codes (IBQ); a training config brings its own"""
    update: Literal["ema", "gradient"] | None = None
    """how the codebook learns; when left out gradient with index_propagation, else ema; a training config brings its
    own"""
    entropy_temperature: float | None = None
    """an entropy loss over the codebook as part of the step, with its softmax at this temperature; none when left out;
    a training config brings its own"""
    sampling_temperature: float | None = None
    """codes of the step drawn from the softmax at this temperature in place of the search; none when left out; a
    training config brings its own"""
    kmeans_iterations: int | None = None
    """iterations of k-means on the tokens besides, for as many centroids as there are codes; none when left out"""
    seed: int = 0
    """seed of the drawn inputs"""

    def __post_init__(self) -> None:
        own = self.tokens is not None or self.codebook is not None
        if (self.shape is not None) + own + (self.training is not None) != 1:
            raise ValueError("expected one of --shape, --tokens with --codebook, or a training config")
        if (self.tokens is None) != (self.codebook is None):
            raise ValueError("--tokens and --codebook: expected both or neither")
        if self.shape is not None:
            parse_shape(self.shape)
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}: expected a positive number, got {value!r}")
        if self.images is not None and self.training is None:
            raise ValueError("--images: expected a training config with it")
        if self.training is None:
            self._check_gradient()

    def _check_gradient(self) -> None:
        propagates = self.gradient == "index_propagation"
        if self.metric == "dot" and not propagates:
            raise ValueError(f"--metric dot: expected --gradient index_propagation with it, got {self.gradient}")
        if propagates and self.update == "ema":
            raise ValueError("--update: expected gradient with --gradient index_propagation, got ema")
        if propagates and self.sampling_temperature is not None:
            raise ValueError("--sampling_temperature: expected none with --gradient index_propagation")

"""What each command can be told. Imports neither torch nor the rest of the package, so that --help is quick.

The options of `train` and `bench` are the config dataclasses of vqkernels.models and vqkernels.benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WORD = {"positional": True}  # a required word without a dash
OUTPUT = {"short": "-o"}


@dataclass
class DemoConfig:
    """Options"""

    output: str = field(default="runs/demo", metadata=OUTPUT)
    """folder for the picture, codes, model and logs; what an earlier demo left there is replaced"""
    seconds: float = 90.0
    """time to train for"""
    data: str | None = None
    """folder of images to train on instead of the bundled photographs"""
    threads: int | None = None
    """CPU threads; the cores that this process may use, at most 8, when left out"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes the GPU where there is one"""
    seed: int = 0
    """seed of the weights and of the crops"""


@dataclass
class ReconstructConfig:
    """Options"""

    model: str = field(metadata=WORD)
    """folder with a model (runs/NAME or runs/NAME/model), or hf://OWNER/NAME"""
    images: list[str] = field(metadata=WORD)
    """image files, or folders of them"""
    output: str = field(default="reconstructions", metadata=OUTPUT)
    """folder for the pictures"""
    fit: Literal["pad", "crop"] = "pad"
    """where the size is not a multiple of the model's factor: repeat the border and cut it off again, or crop"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""


@dataclass
class EvaluateConfig:
    """Options"""

    model: str = field(metadata=WORD)
    """folder with a model (runs/NAME or runs/NAME/model), or hf://OWNER/NAME"""
    images: list[str] = field(metadata=WORD)
    """image files, or folders of them"""
    output: str = field(default="evaluation", metadata=OUTPUT)
    """folder for report.html and evaluation.json"""
    image_size: int = 256
    """side of the centre crops, which are scaled so that a picture's shorter side fits"""
    batch_size: int = 8
    """images at a time"""
    pixels: Literal["uint8", "float"] = "uint8"
    """compare what an 8-bit picture of the reconstruction holds, as published tables do, or the network's numbers"""
    vgg: str | None = None
    """file with VGG16's weights (features.0.weight ...), for LPIPS"""
    lpips: str | None = None
    """file with LPIPS's linear weights (lin0.model.1.weight ...); needs vgg"""
    inception: str | None = None
    """file with the weights of FID's InceptionV3 (pt_inception-2015-12-05-6726825d.pth), for rFID"""
    inception_resize: Literal["tensorflow", "pytorch"] = "tensorflow"
    """how pictures become 299 x 299 for rFID: as the original and torch-fidelity do, or as pytorch-fid does"""
    random_features: bool = False
    """without those files, measure with random features; such a number is no LPIPS and no FID, and not called so"""
    shown: int = 4
    """worst and best pictures in the report, each"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""


@dataclass
class EncodeConfig:
    """Options"""

    model: str = field(metadata=WORD)
    """folder with a model (runs/NAME or runs/NAME/model), or hf://OWNER/NAME"""
    folder: str = field(metadata=WORD)
    """folder of images, searched through all its sub-folders"""
    output: str = field(default="codes", metadata=OUTPUT)
    """folder for codes.npy and meta.json; a model with two maps of codes fills top/ and bottom/ in it"""
    image_size: int | None = None
    """scale and center-crop every image to this; when left out all must have one size, and it stays"""
    batch_size: int = 8
    """images at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""


@dataclass
class DecodeConfig:
    """Options"""

    model: str = field(metadata=WORD)
    """folder with the model that made the codes"""
    codes: str = field(metadata=WORD)
    """folder that encode wrote"""
    output: str = field(default="decoded", metadata=OUTPUT)
    """folder for the PNG images"""
    batch_size: int = 8
    """images at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""


@dataclass
class ExportConfig:
    """Options"""

    model: str = field(metadata=WORD)
    """folder with a model (runs/NAME or runs/NAME/model), or hf://OWNER/NAME"""
    output: str = field(default="exported", metadata=OUTPUT)
    """folder for the two files, encoder and decoder"""
    format: Literal["pt2", "onnx"] = "pt2"
    """pt2 for torch.export.load, onnx for ONNX runtimes"""
    plain: bool = False
    """standard ops only, as always for onnx: runs without vqkernels, and a few codes may differ from the exact ones"""


@dataclass
class ConvertConfig:
    """Options"""

    source: str = field(metadata=WORD)
    """checkpoint file (.ckpt, .pt, .pth, .bin, .safetensors), folder of diffusers, or a model folder of vqkernels"""
    output: str = field(default="converted", metadata=OUTPUT)
    """folder for the model; new or empty"""
    to: Literal["vqkernels", "diffusers"] = "vqkernels"
    """whose format to write"""
    layout: Literal["auto", "taming", "ibq", "llamagen", "diffusers"] = "auto"
    """whose file it is; taming's and latent diffusion's are alike, and IBQ's look like them but for 4 blocks a level"""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """the last weights of training (raw) or their average (ema); auto takes the average where there is one"""
    resolution: int = 256
    """side of the images that attention_resolutions in the config is counted for; changes no result"""


@dataclass
class AuditConfig:
    """Options"""

    source: str = field(metadata=WORD)
    """folder with a model (runs/NAME, or hf://OWNER/NAME) and --images; or latents (.npy, .pt, .safetensors) and
    --codebook; or any file with a codebook, such as a checkpoint of another project, and --latents"""
    images: list[str] = field(default_factory=list)
    """image files or folders whose latents the model makes; repeat for more"""
    codebook: str | None = None
    """file with the codebook [K, D]: .npy, .safetensors, .pt, .pth, .ckpt or .bin"""
    latents: str | None = None
    """file with the latents, .npy or as above"""
    key: str | None = None
    """name of the codebook in its file, where more than one tensor there could be it"""
    latents_key: str | None = None
    """name of the latents in their file, where there is more than one tensor in it"""
    channels: Literal["last", "first"] = "last"
    """layout of the latents: last [..., D] | first [B, D, ...]"""
    metric: Literal["auto", "euclidean", "cosine"] = "auto"
    """auto takes the model's own, and euclidean where there is no model"""
    tokens: int | None = None
    """look at so many tokens at most, spread evenly over all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to run; auto takes the GPU where there is one"""
    json: str | None = None
    """write the whole result to this file"""


@dataclass
class BuildConfig:
    """Options"""

    cuda: bool = False
    """also insist on the CUDA library, which is otherwise built where there is a GPU; needs nvcc"""


@dataclass
class InfoConfig:
    """Options"""

    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """element type of the tensors that the backends are asked about"""

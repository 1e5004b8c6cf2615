"""Images for training and for encoding: any Pillow format, deterministic crops, and the bundled photographs."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

# Photographs in the scikit-image wheel with clear terms: CC0 or public domain (the last: no known restrictions)
TRAINING_PHOTOGRAPHS = {
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "retina": "retina.jpg",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
}
HELD_OUT_PHOTOGRAPH = "astronaut.png"  # NASA, public domain

WHITE = (255, 255, 255)
MIN_SIDE = 8  # pixels; a smaller picture is a spacer or an icon, and a crop of it a plain colour
SCAN_CHUNK = 32  # files decoded at once when a folder is opened; bounds the memory of pictures not yet cached
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def _photograph_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the bundled photographs come with scikit-image, which is not installed: "
            "pip install 'vqkernels[demo]', or give a folder of images",
            name="skimage",
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def bundled_photographs() -> dict[str, Path]:
    """Name and file of the training photographs that ship inside scikit-image.

    Raises:
        ModuleNotFoundError: scikit-image is not installed; says which extra brings it.
    """
    folder = _photograph_folder()
    return {name: folder / file for name, file in TRAINING_PHOTOGRAPHS.items()}


def held_out_photograph() -> Path:
    """File of the astronaut, 512x512, which no training run on the bundled photographs sees."""
    return _photograph_folder() / HELD_OUT_PHOTOGRAPH


def list_images(path: str | Path) -> list[Path]:
    """All files below a folder whose name ends as a Pillow format does, sorted; a single file gives itself.

    Raises:
        FileNotFoundError: no such folder or file.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {str(path)!r} does not exist")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (file for file in root.rglob("*") if file.suffix.lower() in known and file.is_file())
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB; transparency is laid on white, deeper greys are scaled to 8 bits."""
    if image.mode in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):
        values = np.asarray(image, dtype=np.float32)
        top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        if image.mode in ("I", "F") and top > 1 and values.max(initial=0) <= 255:
            top = 255.0
        image = Image.fromarray((values * (255 / top)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (*WHITE, 255))
        image.alpha_composite(layer)
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """A decoded picture as 8-bit RGB, turned upright by its EXIF orientation; the first frame of several.

    Raises:
        ValueError: the file cannot be read as an image, or is smaller than 8 pixels; names it.
    """
    try:
        with Image.open(path) as file:
            picture = _to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error
    if min(picture.size) < MIN_SIDE:
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"image {str(path)!r} is {size} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}")
    return picture


def to_tensor(
    picture: Image.Image,
) -> Tensor:  # [3, H, W]
    """Pixels as float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_picture(
    image: Tensor,  # [3, H, W] in [-1, 1]
) -> Image.Image:
    """The reverse of to_tensor; values outside [-1, 1] are clamped."""
    pixels = image.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def load_image(path: str | Path) -> Tensor:  # [3, H, W]
    """A picture at its own size as float32 [3, H, W] in [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no readable image; names it.
    """
    return to_tensor(open_image(path))


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture scaled so that its shorter side is `size`, as guided diffusion and LlamaGen do.

    Halved by means of 2 x 2 while the shorter side is at least twice the size, then scaled by bicubic interpolation.
    Only the square is computed, so that a long strip needs no more memory than it takes itself. Held-out figures,
    encoding and evaluation all take this one, so that a model sees the same pixels in each.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _random_crop(picture: Image.Image, size: int, min_crop: float, generator: torch.Generator) -> Image.Image:
    """A square of random side and place, scaled to `size`, and mirrored half of the time.

    The side is log-uniform between `size` (pixels as they are) and all that the picture holds.
    """
    zoom, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    largest = min(picture.size)
    smallest = min(max(math.sqrt(min_crop) * largest, size), largest)
    side = smallest * (largest / smallest) ** zoom
    left, top = across * (picture.width - side), down * (picture.height - side)
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else crop


def _with_other_colours(
    image: Tensor,  # [3, S, S] in [-1, 1]
    strength: float,
    generator: torch.Generator,
) -> Tensor:  # [3, S, S] in [-1, 1]
    """Hue, contrast and brightness changed at random; at strength 1 by any hue, 0.5 to 1.5 times and +-0.5.

    Hue is a rotation about the grey axis, which keeps the mean of the three channels.
    """
    turn, contrast, brightness = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1).tolist()
    angle = strength * turn * math.pi
    mean, along, across = (1 + 2 * math.cos(angle)) / 3, (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    first = (mean, along - across, along + across)  # a row of Rodrigues' formula; the others follow in a circle
    rotation = torch.tensor([[first[(column - row) % 3] for column in range(3)] for row in range(3)])
    turned = torch.einsum("rc,chw->rhw", rotation.to(image), image)
    return (turned * (1 + 0.5 * strength * contrast) + 0.5 * strength * brightness).clamp(-1, 1)


class PictureCache:
    """Decoded pictures, most recently used kept, within a bound of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.pictures: OrderedDict[Path, Image.Image] = OrderedDict()

    def put(self, path: Path, picture: Image.Image) -> None:
        """Keeps a picture, and lets the least recently used ones go."""
        size = 3 * picture.width * picture.height
        if size > self.max_bytes or path in self.pictures:
            return
        self.pictures[path] = picture
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self.pictures.popitem(last=False)
            self.bytes -= 3 * oldest.width * oldest.height

    def get(self, path: Path) -> Image.Image:
        """The picture of a file, decoded unless it is held; raises what open_image raises."""
        if path in self.pictures:
            self.pictures.move_to_end(path)
            return self.pictures[path]
        picture = open_image(path)
        self.put(path, picture)
        return picture

    @property
    def full(self) -> bool:
        """Whether another picture of ordinary size would push one out."""
        return self.bytes >= 0.9 * self.max_bytes


def _try_open(file: Path) -> Image.Image | str:
    """The picture, or the reason why there is none."""
    try:
        return open_image(file)
    except DECODE_ERRORS as error:
        return str(error)


def _verify(file: Path) -> str | None:
    """The reason why the header of a file cannot be read, or None."""
    try:
        with Image.open(file) as image:
            image.verify()
    except DECODE_ERRORS as error:
        return f"cannot read image {str(file)!r}: {error}"
    return None


def _mix(seed: int, epoch: int, index: int) -> int:
    """A seed for one crop; SeedSequence keeps neighbouring triples independent."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


class ImageFolder(Dataset[Tensor]):
    """Square crops of the images of a folder, float32 [3, image_size, image_size] in [-1, 1].

    A crop is a pure function of (seed, epoch, index): `dataset[epoch, index]`; `dataset[index]` is epoch 0.
    Pictures smaller than the crop are enlarged. Files that cannot be read are left out and listed with their
    reason in `skipped`: every file's decoding is tried until the cache is full, after that its header only; a
    file that fails later is replaced by the next one and named in a warning.

    Args:
        path: a folder (searched recursively), one file, a list of files, or None for the bundled photographs.
        image_size: side of the crops in pixels.
        augment: random crop and mirroring; otherwise `centre_crop`.
        seed: seed of the augmentation.
        min_crop: smallest area of a random crop, as a share of the largest square; a crop is enlarged only where
            the whole picture is smaller than image_size.
        color_jitter: strength of random changes of hue, contrast and brightness, 0 to 1.
        cache_bytes: bound of the memory for decoded pictures, per process.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no readable image in it, or an argument out of range.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path] | None,
        image_size: int,
        *,
        augment: bool = True,
        seed: int = 0,
        min_crop: float = 0.0,
        color_jitter: float = 0.0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if not 0 <= min_crop <= 1:
            raise ValueError(f"min_crop must lie in [0, 1], got {min_crop}")
        if not 0 <= color_jitter <= 1:
            raise ValueError(f"color_jitter must lie in [0, 1], got {color_jitter}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.image_size, self.augment, self.seed, self.min_crop = image_size, augment, seed, min_crop
        self.color_jitter = color_jitter
        self.skipped: list[tuple[Path, str]] = []
        self.cache = PictureCache(cache_bytes)
        self.files = self._readable(_files_of(path))
        if not self.files:
            raise ValueError(_nothing_found(path, self.skipped))

    def _readable(self, files: list[Path]) -> list[Path]:
        """Drops the files that fail; decodes in threads, as Pillow lets go of the interpreter lock."""
        readable: list[Path] = []
        with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:  # not inside the threads: it is global
            warnings.simplefilter("ignore")  # of Pillow on odd metadata
            for first in range(0, len(files), SCAN_CHUNK):
                chunk = files[first : first + SCAN_CHUNK]
                for file, found in zip(chunk, pool.map(_verify if self.cache.full else _try_open, chunk), strict=True):
                    if isinstance(found, str):
                        self.skipped.append((file, found))
                        continue
                    readable.append(file)
                    if found is not None and not self.cache.full:
                        self.cache.put(file, found)
        return readable

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> Image.Image:
        """The whole picture as 8-bit RGB; of the next readable file where this one fails."""
        for step in range(len(self.files)):
            file = self.files[(index + step) % len(self.files)]
            try:
                return self.cache.get(file)
            except DECODE_ERRORS as error:
                if all(file != known for known, _ in self.skipped):
                    self.skipped.append((file, str(error)))
                    warnings.warn(f"skipped {error}", stacklevel=2)
        raise ValueError(f"none of the {len(self.files)} images can be read any more")

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:  # [3, S, S]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.files):
            raise IndexError(f"index must lie in [0, {len(self.files) - 1}], got {index}")
        picture = self.picture(index)
        if not self.augment:
            return to_tensor(centre_crop(picture, self.image_size))
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, index))
        image = to_tensor(_random_crop(picture, self.image_size, self.min_crop, generator))
        return _with_other_colours(image, self.color_jitter, generator) if self.color_jitter else image


def _files_of(path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if path is None:
        return list(bundled_photographs().values())
    if isinstance(path, str | Path):
        return list_images(path)
    return [Path(file) for file in path]


def _nothing_found(
    path: str | Path | Sequence[str | Path] | None,
    skipped: list[tuple[Path, str]],
) -> str:
    where = f"image folder {str(path)!r}" if isinstance(path, str | Path) else "the list of images"
    if skipped:
        return f"{where} holds no readable image; {len(skipped)} could not be read, the first: {skipped[0][1]}"
    return f"{where} holds no images of a format that Pillow reads"


class EndlessBatches(Sampler[list[tuple[int, int]]]):
    """Keys (epoch, index) of one rank's micro-batches, without end, from any step on.

    All ranks together walk one sequence: every epoch a permutation of the images drawn from (seed, epoch),
    the epochs end to end. A micro-batch of step s, micro-batch m, rank r is the slice at
    ((s * micro_batches + m) * ranks + r) * batch_size. So the order is a pure function of the position,
    a run resumes at any step, and R ranks see what one process with the joined batch would see.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int = 0,
        first_batch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.first_batch, self.rank, self.ranks = first_batch, rank, ranks
        self._permutations: OrderedDict[int, list[int]] = OrderedDict()

    def _key(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.images)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, self.images))
            self._permutations[epoch] = torch.randperm(self.images, generator=generator).tolist()
            if len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        return epoch, self._permutations[epoch][place]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.first_batch
        while True:
            first = (batch * self.ranks + self.rank) * self.batch_size
            yield [self._key(position) for position in range(first, first + self.batch_size)]
            batch += 1

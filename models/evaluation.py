"""A model on many pictures: PSNR, SSIM, MS-SSIM, L1, LPIPS, rFID, code use, and the best and worst pictures.

Pictures are read, judged and let go batch by batch: memory holds a few numbers of each. What every figure means is said
in ``evaluation_report`` and stands in the report.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import file_digest
from .crops import Progress, batches, read_crops
from .evaluation_report import (
    PUBLISHED_IMAGES,
    CodeUse,
    EvaluationOptions,
    EvaluationReport,
    Example,
    Figure,
    code_map_use,
    code_use,
    mean_figure,
    pair_kinds,
    set_kind,
)
from .frechet import FeatureGaussian, frechet_distance
from .image_model import ImageModel
from .inception import FEATURES, InceptionFeatures
from .levels import CodedModel
from .metrics import CodeCounter
from .perceptual import SMALLEST_SIDE, PerceptualDistance
from .similarity import SMALLEST_MULTISCALE, WINDOW, similarities

PEAK = 255.0
MOST_NAMED = 5  # broken pictures in a warning; their figures in the report name all
PUBLISHED_INCEPTION = "6726825d"  # how the SHA-256 of the published file begins, and what its name ends with


def to_levels(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    pixels: str = "uint8",
) -> Tensor:  # float32 [B, 3, H, W] in [0, 255]
    """Pixels as they are compared: clamped, and rounded as an 8-bit picture is unless `pixels` is "float"."""
    levels = images.float().clamp(-1, 1).add(1).mul(PEAK / 2)
    return levels.round() if pixels == "uint8" else levels


def pair_figures(
    images: Tensor,  # [B, 3, H, W] in [0, 255]
    others: Tensor,  # [B, 3, H, W]
) -> dict[str, Tensor]:  # float64 [B] each
    """PSNR, SSIM, MS-SSIM and L1 of every pair, by key; NaN where a picture is too small for it."""
    difference = images.double() - others.double()
    similarity, multiscale = similarities(images, others, peak=PEAK)
    return {
        "psnr": 10 * torch.log10(PEAK**2 / difference.square().mean((1, 2, 3))),
        "ssim": similarity,
        "ms_ssim": multiscale,
        "l1": difference.abs().mean((1, 2, 3)) / PEAK,
    }


def _whole(
    maps: tuple[Tensor, ...],  # int64 [B, h, w] each
) -> Tensor:  # bool [B]
    """The pictures of which every token has a code; one that is not finite has -1."""
    return torch.stack([(codes >= 0).flatten(1).all(1) for codes in maps]).all(0)


class _MapCounters:
    """How often every code of every map occurred."""

    def __init__(self, model: CodedModel) -> None:
        self.counters = [CodeCounter(each.quantizer.codebook_size) for each in model.maps.values()]
        self.grids: list[tuple[int, int]] = []

    def update(
        self,
        maps: tuple[Tensor, ...],  # int64 [B, h, w] each
    ) -> None:
        if not len(maps[0]):
            return
        self.grids = [(codes.shape[-2], codes.shape[-1]) for codes in maps]
        for counter, codes in zip(self.counters, maps, strict=True):
            counter.update(codes)

    def use(self, image_size: int) -> CodeUse | None:
        """Everything together; None where nothing was counted."""
        if not self.grids:
            return None
        parts = zip(self.counters, self.grids, strict=True)
        return code_use([code_map_use(each.counts, each.codebook_size, grid) for each, grid in parts], image_size)


class _Extremes:
    """The pictures of lowest and highest PSNR, a fixed number of each."""

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.low: list[tuple[float, int, Example]] = []
        self.high: list[tuple[float, int, Example]] = []

    def add(self, place: int, example: Example) -> None:
        """Keeps an example if it is among them; of equal ones the earlier."""
        rank = example.psnr if not math.isnan(example.psnr) else -math.inf
        for heap, key in ((self.low, -rank), (self.high, rank)):
            heapq.heappush(heap, (key, -place, example))
            if len(heap) > self.shown:
                heapq.heappop(heap)

    def found(self) -> tuple[list[Example], list[Example]]:
        """Worst first and best first; no picture is in both."""
        low, high = sorted(self.low, reverse=True), sorted(self.high, reverse=True)
        taken = {place for _, place, _ in low}
        return [example for *_, example in low], [example for _, place, example in high if place not in taken]


class _Evaluator:
    """Takes batch after batch and sums up at the end."""

    def __init__(self, model: ImageModel, options: EvaluationOptions) -> None:
        self.model, self.options = model, options
        self.device = next(model.parameters()).device
        self.kinds = pair_kinds(options)
        self.perceptual: PerceptualDistance | None = None
        if (options.vgg or options.random_features) and options.image_size >= SMALLEST_SIDE:
            self.perceptual = PerceptualDistance(options.vgg, options.lpips).to(self.device)
        self.distances = _SetDistance(options, self.device)
        self.counter = _MapCounters(model) if isinstance(model, CodedModel) else None
        self.extremes = _Extremes(options.shown)
        self.files: list[str] = []
        self.values: dict[str, list[float]] = {kind.key: [] for kind in self.kinds}

    def _through(
        self,
        images: Tensor,  # [B, 3, S, S] in [-1, 1]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # [B, 3, S, S], codes [B, h, w] each
        """Reconstructions, and the codes of a model that has them, which are counted; NaN where a token has none, being
        not finite."""
        if self.counter is None or not isinstance(self.model, CodedModel):
            return self.model.reconstruct(images), ()
        codes: Any = self.model.encode(images)
        maps = (codes,) if isinstance(codes, Tensor) else tuple(codes)
        whole = _whole(maps)
        kept = tuple(each[whole] for each in maps)
        self.counter.update(kept)
        reconstructions = torch.full_like(images, math.nan)
        if len(kept[0]):
            made = self.model.decode(kept[0] if isinstance(codes, Tensor) else kept)  # type: ignore[arg-type]
            reconstructions = made.new_full((len(images), *made.shape[1:]), math.nan)
            reconstructions[whole] = made
        return reconstructions, maps

    @torch.no_grad()
    def add(
        self,
        files: list[Path],
        crops: Tensor,  # uint8 [B, 3, S, S]
    ) -> None:
        """One batch."""
        levels = crops.to(self.device).float()  # [B, 3, S, S] in [0, 255]
        images = levels / (PEAK / 2) - 1
        reconstructions, codes = self._through(images)
        if reconstructions.shape != images.shape:
            raise ValueError(f"the model must reconstruct {list(images.shape)}, got {list(reconstructions.shape)}")
        others = to_levels(reconstructions, self.options.pixels)
        found = pair_figures(levels, others)
        if self.perceptual is not None:
            found[self.kinds[-1].key] = self.perceptual(images, others / (PEAK / 2) - 1)
        self.distances.update(levels, others)
        self._record(files, {key: value.double().tolist() for key, value in found.items()})
        self._keep(files, crops, others, codes)

    def _record(self, files: list[Path], found: dict[str, list[float]]) -> None:
        self.files += [str(file) for file in files]
        for key, values in self.values.items():
            values += found.get(key, [math.nan] * len(files))

    def _keep(self, files: list[Path], crops: Tensor, others: Tensor, codes: tuple[Tensor, ...]) -> None:
        pictures = others.nan_to_num().round().to(torch.uint8).cpu()
        first = len(self.files) - len(files)
        for place, file in enumerate(files):
            maps = tuple(each[place].cpu() for each in codes)
            psnr = self.values["psnr"][first + place]
            self.extremes.add(first + place, Example(str(file), psnr, crops[place], pictures[place], maps))

    def _missing(self, key: str) -> str:
        """Why a figure of pairs could not be measured; empty where it was."""
        side = self.options.image_size
        if key in ("ssim", "ms_ssim"):
            least = WINDOW if key == "ssim" else SMALLEST_MULTISCALE
            return f"needs pictures of at least {least} pixels" if side < least else ""
        if key in ("psnr", "l1") or self.perceptual is not None:
            return ""
        too_small = (self.options.vgg or self.options.random_features) and side < SMALLEST_SIDE
        return (
            f"needs pictures of at least {SMALLEST_SIDE} pixels"
            if too_small
            else "needs the weight files vgg and lpips"
        )

    def figures(self) -> dict[str, Figure]:
        """All figures by key, those that could not be measured too."""
        found = {}
        for kind in self.kinds:
            found[kind.key] = mean_figure(kind, self.values[kind.key], self._missing(kind.key))
        distance = self.distances.figure(samples=False)
        return {**found, distance.kind.key: distance}

    def broken(self) -> list[str]:
        """A warning where reconstructions are not finite."""
        pairs = zip(self.files, self.values["psnr"], strict=True)
        found = [Path(file).name for file, psnr in pairs if math.isnan(psnr)]
        if not found:
            return []
        named = ", ".join(found[:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")
        counted = ", and their codes are not counted" if self.counter is not None else ""
        return [
            f"{len(found)} of {len(self.files)} reconstructions hold values that are not finite, and the figures with "
            f"them{counted}: {named}"
        ]

    def per_image(self) -> dict[str, list[float]]:
        """The figures that were measured, of every picture."""
        return {key: values for key, values in self.values.items() if not self._missing(key)}


class _SetDistance:
    """The Fréchet distance between originals and what the model makes of them, where there are features for it."""

    def __init__(self, options: EvaluationOptions, device: torch.device) -> None:
        self.options = options
        self.network: InceptionFeatures | None = None
        if options.inception or options.random_features:
            self.network = InceptionFeatures(options.inception, resize=options.inception_resize).to(device)
        self.real, self.made = FeatureGaussian(FEATURES), FeatureGaussian(FEATURES)

    def update(
        self,
        originals: Tensor | None,  # [B, 3, H, W] in [0, 255]
        made: Tensor | None,  # [B, 3, H, W]
    ) -> None:
        """Adds pictures to either side."""
        if self.network is None:
            return
        for side, pictures in ((self.real, originals), (self.made, made)):
            if pictures is not None:
                side.update(self.network(pictures))

    def figure(self, *, samples: bool) -> Figure:
        """The distance, or why there is none."""
        kind = set_kind(self.options, samples=samples)
        if self.network is None:
            return Figure(kind, None, 0, missing="needs the weight file inception")
        if min(self.real.count, self.made.count) < 2:
            return Figure(kind, None, self.real.count, missing="needs at least 2 pictures")
        return Figure(kind, frechet_distance(self.real, self.made), self.real.count)

    def warnings(self, weights: dict[str, dict[str, str]], *, samples: bool) -> list[str]:
        """What a reader of the distance must know."""
        if self.network is None:
            return []
        count, found = self.real.count, []
        name = set_kind(self.options, samples=samples).label
        if "inception" in weights and not weights["inception"]["sha256"].startswith(PUBLISHED_INCEPTION):
            found.append(
                f"{name}: the weights are not the published file byte for byte (SHA-256 {PUBLISHED_INCEPTION}...), so "
                "that the name holds only if they are the same numbers"
            )
        if count <= FEATURES:
            found.append(
                f"{name}: {count} pictures for {FEATURES} features, so the covariances are singular and the figure is "
                f"far from what more pictures would give; published tables take {PUBLISHED_IMAGES:,}"
            )
        elif self.network.is_published and count < PUBLISHED_IMAGES:
            found.append(
                f"{name} falls as the number of pictures rises: {count:,} here, "
                f"{PUBLISHED_IMAGES:,} in published tables"
            )
        return found


def _describe(model: ImageModel) -> dict[str, object]:
    return {
        "class": type(model).__name__,
        "fingerprint": model.fingerprint(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "factor": model.factor if hasattr(model.config, "factor") else None,
        "config": asdict(model.config),
    }


def _weight_files(options: EvaluationOptions) -> dict[str, dict[str, str]]:
    """Which files the figures rest on."""
    found = {}
    for name in ("vgg", "lpips", "inception"):
        path = getattr(options, name)
        if path is not None:
            found[name] = {"file": str(path), "sha256": file_digest(path)}
    return found


def _check(model: ImageModel, options: EvaluationOptions) -> None:
    name = type(model).__name__
    if not model.reconstructs:
        if not callable(getattr(model, "generate", None)):
            raise ValueError(f"a {name} neither reconstructs pictures nor generates them: there is nothing to evaluate")
        if not options.inception and not options.random_features:
            raise ValueError(
                f"a {name} generates pictures and reconstructs none, so that only FID of its samples applies: "
                "expected inception, the weights of FID's InceptionV3"
            )
    if model.in_channels != 3:
        raise ValueError(f"expected a model of colour pictures, got one of {model.in_channels} channels")
    if options.image_size % model.factor:
        raise ValueError(
            f"image_size must be a multiple of the model's factor {model.factor}, got {options.image_size}"
        )


def evaluate_files(
    model: ImageModel,
    files: Sequence[str | Path],
    options: EvaluationOptions | None = None,
    *,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Evaluates a model on the centre crops of pictures; changes nothing in the model.

    Figures of pairs (PSNR, SSIM, MS-SSIM, L1, LPIPS) are measured on every picture and its reconstruction and averaged;
    rFID compares the two sets; code use counts the codes of all pictures together, map by map. A model that
    generates and does not reconstruct gets the FID of `generate(count, seed)` alone, of as many samples as pictures and
    of their size.
    Nothing is downloaded: LPIPS and FID need the files that the options name.

    Args:
        model: any ImageModel; pictures go to the device that it is on.
        files: image files; those that cannot be read are listed in the report.
        options: see EvaluationOptions.
        progress: called with the number of files done and that of all.

    Raises:
        ValueError: no file can be read; the size of the crops does not fit the model; a weight file is not what it
            should be; the model neither reconstructs nor generates.
        FileNotFoundError: a weight file that is not there.
    """
    options = EvaluationOptions() if options is None else options
    _check(model, options)
    training, measure = model.training, _reconstructions if model.reconstructs else _samples
    model.eval()
    try:
        return measure(model, list(map(Path, files)), options, progress)
    finally:
        model.train(training)


def _nothing(files: Sequence[Path], skipped: list[tuple[Path, str]]) -> ValueError:
    first = f"; the first: {skipped[0][1]}" if skipped else ""
    return ValueError(f"none of the {len(files)} images can be read{first}")


def _reconstructions(
    model: ImageModel, files: list[Path], options: EvaluationOptions, progress: Progress | None
) -> EvaluationReport:
    start, skipped = time.monotonic(), list[tuple[Path, str]]()
    evaluator = _Evaluator(model, options)
    crops = read_crops(files, options.image_size, skipped, ahead=2 * options.batch_size, progress=progress)
    for names, batch in batches(crops, options.batch_size):
        evaluator.add(names, batch)
    if not evaluator.files:
        raise _nothing(files, skipped)
    worst, best = evaluator.extremes.found()
    weights = _weight_files(options)
    warnings = evaluator.distances.warnings(weights, samples=False)
    warnings += evaluator.broken()
    return EvaluationReport(
        options=options,
        model=_describe(model),
        figures=evaluator.figures(),
        codes=evaluator.counter.use(options.image_size) if evaluator.counter is not None else None,
        files=evaluator.files,
        per_image=evaluator.per_image(),
        skipped=skipped,
        warnings=warnings,
        weights=weights,
        device=str(evaluator.device),
        seconds=time.monotonic() - start,
        worst=worst,
        best=best,
    )


@torch.no_grad()
def _samples(
    model: ImageModel, files: list[Path], options: EvaluationOptions, progress: Progress | None
) -> EvaluationReport:
    """FID alone, of as many samples as there are pictures."""
    start, device, side = time.monotonic(), next(model.parameters()).device, options.image_size
    distance, skipped, names = _SetDistance(options, device), list[tuple[Path, str]](), list[str]()
    crops = read_crops(files, options.image_size, skipped, ahead=2 * options.batch_size, progress=progress)
    for batch_names, batch in batches(crops, options.batch_size):
        # a seed of its own for each batch; of the originals' size, or FID would tell sizes apart
        made = model.generate(len(batch), len(names), height=side, width=side)  # type: ignore[operator]
        if made.shape != batch.shape:
            raise ValueError(f"the model must generate {list(batch.shape)}, got {list(made.shape)}")
        names += map(str, batch_names)
        distance.update(batch.to(device), to_levels(made, options.pixels))
    if not names:
        raise _nothing(files, skipped)
    figure, weights = distance.figure(samples=True), _weight_files(options)
    return EvaluationReport(
        options=options,
        model=_describe(model),
        figures={figure.kind.key: figure},
        codes=None,
        files=names,
        per_image={},
        skipped=skipped,
        warnings=distance.warnings(weights, samples=True),
        weights=weights,
        device=str(device),
        seconds=time.monotonic() - start,
    )

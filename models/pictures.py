"""Pictures of what a model does: input | reconstruction | map of the codes; or images that it generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data import to_picture

BACKGROUND = (250, 250, 248)
INK = (38, 38, 42)
FAINT = (122, 122, 128)


def _ranks(
    values: Tensor,  # [K, 3]
) -> Tensor:  # [K, 3]
    """Every column's rank among its values, spread over [0, 1]."""
    return values.argsort(dim=0).argsort(dim=0).double() / max(len(values) - 1, 1)


def _principal_components(
    codebook: Tensor,  # [K, D]
) -> Tensor:  # [K, 3]
    """Coordinates of the codes along the three directions in which they differ most, with a fixed sign."""
    centred = codebook.detach().double().cpu()
    centred = torch.nan_to_num(centred - centred.mean(dim=0))
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)  # [min(K, D), D]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    coordinates = centred @ (directions * largest.sign()).T[:, :3]
    return torch.nn.functional.pad(coordinates, (0, 3 - coordinates.shape[1]))


def _oklab_to_srgb(
    colours: Tensor,  # [K, 3] lightness, green-red, blue-yellow
) -> Tensor:  # [K, 3] uint8
    """Björn Ottosson's OKLab (2020), in which equal steps look equal."""
    to_lms = torch.tensor(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((colours.float() @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    gamma = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(1e-9) ** (1 / 2.4) - 0.055)
    return gamma.mul(255).round().to(torch.uint8)


def code_colours(
    codebook: Tensor,  # [K, D]
) -> Tensor:  # [K, 3] uint8
    """A colour for every code; codes that lie close to each other get similar colours.

    The first three principal components of the codebook, by rank, become lightness and the two colour axes of
    OKLab, so that the whole range is used whatever the spread of the codes.
    """
    lightness, across, along = _ranks(_principal_components(codebook)).unbind(dim=1)
    angle, radius = 2 * torch.pi * across, 0.06 + 0.09 * along
    return _oklab_to_srgb(torch.stack([0.32 + 0.6 * lightness, radius * angle.cos(), radius * angle.sin()], dim=1))


def code_map(
    codes: Tensor,  # [h, w]
    colours: Tensor,  # [K, 3] uint8, of code_colours
    factor: int,
) -> Image.Image:
    """One square of factor x factor pixels per code."""
    pixels = colours[codes.detach().cpu().long()].numpy()
    height, width = codes.shape
    return Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _caption(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    title: str,
    detail: str,
    size: int,
    width: int,
) -> None:
    """A title, and behind it a detail in a fainter tone where both fit."""
    font = _font(size)
    draw.text(place, title, fill=INK, font=font)
    left = place[0] + int(draw.textlength(title + "  ", font=font))
    if detail and left + draw.textlength(detail, font=font) <= place[0] + width:
        draw.text((left, place[1]), detail, fill=FAINT, font=font)


def comparison(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
    codes: Tensor,  # [B, h, w]
    codebook: Tensor,  # [K, D]
    *,
    details: Sequence[str] = ("", "", ""),
) -> Image.Image:
    """Input, reconstruction and map of the codes side by side, one row per image, with a caption over each column.

    Args:
        images, reconstructions: of one shape; values outside [-1, 1] are clamped.
        codes: codes of the images.
        codebook: gives every code its colour.
        details: a few words behind the three captions, for instance the PSNR.
    """
    return comparison_of_maps(images, reconstructions, [("codes", codes, codebook)], details=details)


def comparison_of_maps(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
    maps: Sequence[tuple[str, Tensor, Tensor]],  # title, codes [B, h, w], codebook [K, D]
    *,
    details: Sequence[str],
) -> Image.Image:
    """`comparison` with a column for each of several maps of codes; as many details as columns."""
    if images.shape != reconstructions.shape or any(len(images) != len(codes) for _, codes, _ in maps):
        shapes = ", ".join(
            str(list(each.shape)) for each in (images, reconstructions, *(codes for _, codes, _ in maps))
        )
        raise ValueError(f"images, reconstructions and codes must belong together, got {shapes}")
    columns = [[to_picture(image) for image in part] for part in (images, reconstructions)]
    for _, codes, codebook in maps:
        factor, colours = images.shape[2] // codes.shape[1], code_colours(codebook)
        columns.append([code_map(code, colours, factor) for code in codes])
    titles = ("input", "reconstruction", *(title for title, _, _ in maps))
    return _lay_out(list(zip(*columns, strict=True)), list(zip(titles, details, strict=True)))


def pairs(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    reconstructions: Tensor,  # [B, 3, H, W]
    *,
    details: Sequence[str] = ("", ""),
) -> Image.Image:
    """`comparison` for a model without codes: input and reconstruction."""
    if images.shape != reconstructions.shape:
        shapes = f"{list(images.shape)} and {list(reconstructions.shape)}"
        raise ValueError(f"images and reconstructions must belong together, got {shapes}")
    rows = [tuple(map(to_picture, pair)) for pair in zip(images, reconstructions, strict=True)]
    return _lay_out(rows, list(zip(("input", "reconstruction"), details, strict=True)))


def grid(
    images: Tensor,  # [B, 3, H, W] in [-1, 1]
    *,
    columns: int = 4,
    detail: str = "",
) -> Image.Image:
    """Generated images, row by row, as many as fill the rows."""
    pictures = [to_picture(image) for image in images]
    columns = min(columns, len(pictures))
    starts = range(0, len(pictures) - columns + 1, columns)
    rows = [tuple(pictures[start : start + columns]) for start in starts]
    return _lay_out(rows, [("generated", detail), *[("", "")] * (columns - 1)])


def _lay_out(
    rows: Sequence[tuple[Image.Image, ...]],
    captions: Sequence[tuple[str, str]],
) -> Image.Image:
    """A grid of equally large pictures under one line of captions."""
    width, height = rows[0][0].size
    scale = max(1, -(-160 // width))  # tiny crops are enlarged, or the captions would not fit
    width, height = width * scale, height * scale
    gap, size = max(8, width // 48), max(13, width // 24)
    top = 2 * gap + size + size // 4
    canvas = Image.new("RGB", (gap + len(captions) * (width + gap), top + len(rows) * (height + gap)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, (title, detail) in enumerate(captions):
        left = gap + column * (width + gap)
        _caption(draw, (left, gap), title, detail, size, width)
        for row, pictures in enumerate(rows):
            picture = pictures[column].resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + row * (height + gap)))
    return canvas

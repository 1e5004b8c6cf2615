"""`vqkernels export`: a model's encoder and decoder as graphs that need none of its Python."""

from __future__ import annotations

from pathlib import Path

import torch

from vqkernels.export import decoder_program, encoder_program, save
from vqkernels.models import KLVAE, ImageTokenizer

from .loading import load_model
from .options import ExportConfig
from .terminal import make_console, make_table, quiet_libraries


def run(config: ExportConfig) -> None:
    """Writes encoder and decoder, and says what goes in and comes out."""
    console = make_console()
    model, folder = load_model(config.model, torch.device("cpu")), Path(config.output)
    if not isinstance(model, ImageTokenizer | KLVAE):
        raise ValueError(
            f"{config.model}: expected a model with one map of codes or latents, got a {type(model).__name__}"
        )
    encoded = (
        "codes [B, h, w]" if isinstance(model, ImageTokenizer) else f"latents [B, {model.config.latent_channels}, h, w]"
    )
    plain = config.plain or config.format == "onnx"
    images = torch.zeros(2, model.in_channels, 4 * model.factor, 4 * model.factor)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with quiet_libraries():
        programs = {
            "encoder": encoder_program(model, images, plain=plain),
            "decoder": decoder_program(model, model.encode(images), plain=plain),
        }
        for name, program in programs.items():
            path = folder / f"{name}.{config.format}"
            save(program, path)
            takes = f"images [B, {model.in_channels}, H, W] in [-1, 1]" if name == "encoder" else encoded
            rows.append((str(path), takes, f"{path.stat().st_size / 1e6:.2f} MB"))
    console.print(make_table(f"{config.model} as {config.format}", ("file", "takes", "size"), rows, text_columns=2))
    if not plain:
        console.print("to load: import vqkernels.ops, then torch.export.load(file).module()", markup=False)

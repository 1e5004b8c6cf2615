"""`vqkernels convert`: everyone's VQGAN and KL-VAE checkpoints in, a model folder of vqkernels or of diffusers out."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vqkernels.models import (
    KLVAE,
    VQGAN,
    Converted,
    KLVAEConfig,
    VQGANConfig,
    load_foreign,
    load_pretrained,
    save_diffusers,
)
from vqkernels.models.model_config import VectorQuantizerConfig

from .options import ConvertConfig
from .terminal import make_console, make_table, quiet_libraries


def _check_output(output: str) -> Path:
    """The folder to write to.

    Raises:
        ValueError: there is something at that place.
    """
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--output: expected a new or an empty folder, got {output}")
    return folder


def _is_own(source: Path) -> bool:
    return any((source / inner / "model.safetensors").is_file() for inner in ("", "model"))


def _load(config: ConvertConfig) -> Converted:
    source = Path(config.source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not _is_own(source):
        return load_foreign(source, layout=config.layout, weights=config.weights, resolution=config.resolution)
    model = load_pretrained(source)
    if not isinstance(model, VQGAN | KLVAE):
        raise ValueError(
            f"{source}: expected a VQGAN or KLVAE, got a {type(model).__name__}, which no other project can read"
        )
    return Converted(model, "vqkernels", "raw", {})


def _attended(config: VQGANConfig | KLVAEConfig) -> list[int]:
    """Sides of the maps with attention, for images of the config's resolution."""
    return [config.resolution >> level for level, attends in enumerate(config.attention) if attends]


def _bottleneck(config: VQGANConfig | KLVAEConfig) -> tuple[str, str]:
    if isinstance(config, KLVAEConfig):
        return "latents", f"{config.latent_channels} channels, continuous"
    quantizer = config.quantizer
    search = quantizer.metric if isinstance(quantizer, VectorQuantizerConfig) else "lookup-free"
    return "codes", f"{quantizer.codebook_size} of {config.codebook_dim} numbers, {search}"


def _print(console: Console, found: Converted) -> None:
    config = found.model.config
    rows = [
        ("layout", found.layout),
        ("weights", found.weights),
        _bottleneck(config),
        (
            "pixels per code" if isinstance(config, VQGANConfig) else "pixels per latent",
            f"{config.factor} x {config.factor}",
        ),
        ("channels", f"{config.channels} x {config.channel_multipliers}, {config.blocks} blocks"),
        ("attention after every block", ", ".join(map(str, _attended(config))) or "nowhere"),
        ("parameters", f"{sum(each.numel() for each in found.model.parameters()) / 1e6:.1f} million"),
        ("left out", ", ".join(f"{name} ({count})" for name, count in found.skipped.items()) or "nothing"),
    ]
    console.print(make_table("Converted", ("what", "found"), rows, text_columns=2))


def run(config: ConvertConfig) -> None:
    """Writes the folder and prints what the file held.

    Raises:
        ValueError: the file is damaged, would run code or is no VQGAN; or the format cannot hold the model.
    """
    folder, console = _check_output(config.output), make_console()
    with quiet_libraries():
        found = _load(config)
        if config.to == "diffusers":
            save_diffusers(found.model, folder)
        else:
            found.model.save_pretrained(folder)
    _print(console, found)
    reader = f"vqkernels.models.{type(found.model).__name__}"
    if config.to == "diffusers":
        reader = "diffusers.VQModel" if isinstance(found.model, VQGAN) else "diffusers.AutoencoderKL"
    console.print(f"saved in {config.output}/, for {reader}.from_pretrained", markup=False)

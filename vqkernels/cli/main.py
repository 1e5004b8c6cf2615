"""The console script: chooses the sub-command, imports only that one, and turns mistakes into one line on stderr."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from vqkernels._version import __version__


@dataclass(frozen=True)
class Command:
    """A sub-command: `run(config)` of the module vqkernels.cli.<name>, with the options in a dataclass."""

    help: str
    config: str  # module:dataclass, torch-free
    bundled: str | None = None  # module:folder of YAML files that -c takes by name


def _load(place: str | None) -> Any:
    """What `module:name` stands for."""
    if place is None:
        return None
    module, name = place.split(":")
    return getattr(importlib.import_module(f"vqkernels.{module}"), name)


COMMANDS = {
    "demo": Command(
        "train a small VQ-VAE on real photographs and show what comes out (about two minutes on two CPU cores)",
        "cli.options:DemoConfig",
    ),
    "train": Command(
        "train a model on a folder of images", "models.config:TrainConfig", bundled="models.config:CONFIG_FOLDER"
    ),
    "reconstruct": Command(
        "send images through a model and save input | reconstruction | code map", "cli.options:ReconstructConfig"
    ),
    "evaluate": Command(
        "measure PSNR, SSIM, LPIPS, rFID and code use of a model on many images, as one HTML page and as JSON",
        "cli.options:EvaluateConfig",
    ),
    "encode": Command("turn a folder of images into an .npy file of codes", "cli.options:EncodeConfig"),
    "decode": Command("turn a folder of codes back into images", "cli.options:DecodeConfig"),
    "export": Command(
        "write a model's encoder and decoder as graphs, for torch.export.load or ONNX runtimes",
        "cli.options:ExportConfig",
    ),
    "convert": Command(
        "turn a VQGAN or KL-VAE checkpoint of taming, latent diffusion, LlamaGen, IBQ or diffusers into a model folder",
        "cli.options:ConvertConfig",
    ),
    "bench": Command("time the operators of this package beside others", "benchmarks.config:BenchConfig"),
    "profile": Command(
        "show where the time and memory of a search or a training step go, as one HTML page and as JSON",
        "cli.profile_options:ProfileConfig",
    ),
    "audit": Command(
        "count the codes that bf16, TF32 and fp32 formulas get wrong on your own latents, and what that costs",
        "cli.options:AuditConfig",
    ),
    "build": Command("compile the C++ (and CUDA) kernels ahead of time", "cli.options:BuildConfig"),
    "info": Command("show versions, hardware and which backend runs which operator, and why", "cli.options:InfoConfig"),
}

# Errors a user can act on, by name, because importing their classes would import torch
MISTAKES = ("BackendError", "OutOfMemoryError")
LONGEST_MESSAGE = 400  # characters; torch lists every tensor that does not fit
EXIT_MISTAKE = 2  # what the user can set right: an argument, a file, a missing package
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vqkernels COMMAND [options]",
            "",
            "Exact vector quantization kernels, and the VQ-VAE models on top of them.",
            "",
            "commands:",
            *rows,
            "",
            "`vqkernels COMMAND --help` lists a command's options; VQKERNELS_DEBUG=1 shows tracebacks.",
        ]
    )


def _complain(message: str) -> int:
    """One line on stderr; the traceback and the whole message as well when VQKERNELS_DEBUG=1."""
    line, debug = " ".join(message.split()), os.environ.get("VQKERNELS_DEBUG") == "1"
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if len(line) > LONGEST_MESSAGE and not debug:
        line = f"{line[:LONGEST_MESSAGE]} ... (VQKERNELS_DEBUG=1 shows all)"
    print(f"vqkernels: error: {line}", file=sys.stderr)
    return EXIT_MISTAKE


def _unknown_command(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return _complain(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}{hint}")


def _describe(error: Exception) -> str:
    """An exception that a user's input brought about, as a sentence."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    if isinstance(error, ImportError) and error.name and not error.name.startswith("vqkernels"):
        extra = "export" if error.name.startswith("onnx") else "demo"
        return f"{error.name} is not installed; this command needs pip install 'vqkernels[{extra}]' ({error})"
    return str(error) or type(error).__name__


def _is_mistake(error: Exception) -> bool:
    """Whether the message alone helps the user; anything else is a defect and keeps its traceback."""
    if isinstance(error, ValueError | OSError | ModuleNotFoundError) or str(error).startswith("VQKERNELS_"):
        return True
    return any(kind.__name__ in MISTAKES for kind in type(error).__mro__)


def _run(name: str, words: list[str]) -> int:
    from .parsing import parse_config

    if name in ("demo", "train", "evaluate"):
        # before torch starts its threads: on a machine with other work, threads that spin while they wait for each
        # other made two of them 10 times slower than one (17 steps in 30 s instead of 191, 2 cores at load 7)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = COMMANDS[name]
    sentence = f"{command.help[0].upper()}{command.help[1:]}."
    bundled = _load(command.bundled)
    config = parse_config(_load(command.config), f"vqkernels {name}", sentence, words, bundled=bundled)
    return importlib.import_module(f"vqkernels.cli.{name}").run(config) or 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        arguments: the words after `vqkernels`; taken from sys.argv when None.

    Returns:
        the exit code: 0, 2 for a mistake in the input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"vqkernels {__version__}")
        return 0
    if name not in COMMANDS:
        return _unknown_command(name)
    try:
        return _run(name, arguments[1:])
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `vqkernels info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _is_mistake(error):
            raise
        return _complain(_describe(error))


if __name__ == "__main__":
    sys.exit(main())

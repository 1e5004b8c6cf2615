"""Graphs of a trained model for deployment: images or latents to codes, and codes back.

    program = encoder_program(model, images)              # torch.export.ExportedProgram: x -> codes
    save(program, "encoder.pt2")                          # torch.export.load needs `import vqkernels` first
    save(encoder_program(model, images, plain=True), "encoder.onnx")

Any size of batch, height and width works afterwards, whatever the example had. With ``plain=True`` the graph holds
standard aten ops only, and the codes are those of ``vqkernels.plain_ops``: it runs where vqkernels is not installed, in
ONNX Runtime, and compiled ahead of time (``torch._inductor.aoti_compile_and_package``).
"""

from __future__ import annotations

import copy
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .ops.plain import plain_ops

FORMATS = (".pt2", ".onnx")
OPSET = 18  # the first with a reduction that scatters sums


class _Encoder(nn.Module):
    """x -> codes."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode(x)


class _Decoder(nn.Module):
    """Codes -> images, or what a quantizer gives to its decoder."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes) if hasattr(self.model, "decode") else self.model.lookup(codes)


def encoder_program(
    model: nn.Module,
    x: Tensor,  # [B, C, H, W] for a model, as its forward takes it for a quantizer
    *,
    plain: bool = False,
) -> ExportedProgram:
    """``model.encode`` as a graph: x -> codes int64.

    Args:
        model: a quantizer of ``vqkernels.nn``, or a model of ``vqkernels.models`` that encodes images, in eval mode.
        x: an example; all axes but the channels are free afterwards. Images have sides that are multiples of the
            model's ``factor`` and at least two of them.
        plain: standard ops only, see ``vqkernels.plain_ops``. Otherwise one node of ``vqkernels::nearest``: exact,
            and on the fastest kernel of the machine that runs it.

    Raises:
        TypeError: the model has no encode.
        ValueError: it is in training mode.
    """
    factor = getattr(model, "factor", 1)
    layout: Any = getattr(model, "layout", model)  # where a quantizer keeps it
    channels = 1 if factor > 1 or getattr(layout, "channels", None) == "first" else x.dim() - 1
    free = {axis: f"x{axis}" for axis in range(x.dim()) if axis != channels}
    shape = {axis: factor * Dim(name) if axis > 1 and factor > 1 else Dim.DYNAMIC for axis, name in free.items()}
    return _export(_Encoder(model), x, shape, plain)


def decoder_program(
    model: nn.Module,
    codes: Tensor,  # int64 [B, h, w] (KLVAE: latents [B, C, h, w]), as ``lookup`` takes them for a VectorQuantizer
    *,
    plain: bool = False,
) -> ExportedProgram:
    """``model.decode`` (``lookup`` of a VectorQuantizer) as a graph: codes -> images (or quantized).

    Args:
        model, plain: as for ``encoder_program``; the result does not depend on ``plain``, there is no search in it.
        codes: an example; all axes are free afterwards, but for the channels of latents.

    Raises:
        TypeError: the model has neither decode nor lookup.
        ValueError: it is in training mode.
    """
    free = [axis for axis in range(codes.dim()) if axis != 1 or not codes.is_floating_point()]
    return _export(_Decoder(model), codes, dict.fromkeys(free, Dim.DYNAMIC), plain)


def _export(wrapper: _Encoder | _Decoder, example: Tensor, shape: dict[int, object], plain: bool) -> ExportedProgram:
    model = wrapper.model
    wanted = ("encode",) if isinstance(wrapper, _Encoder) else ("decode", "lookup")
    if not any(hasattr(model, name) for name in wanted):
        raise TypeError(f"model: expected a module with {' or '.join(wanted)}, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected in eval mode, got one in training mode; call .eval() first")
    for axis in shape:
        if example.shape[axis] == 1:  # torch.export would take it for a constant
            example = torch.cat([example, example], axis)
    with torch.no_grad(), plain_ops() if plain else nullcontext():
        program = torch.export.export(wrapper, (example,), dynamic_shapes=(shape,))
        return torch.export.export(_without_unused(wrapper, program), (example,), dynamic_shapes=(shape,))


def _without_unused(wrapper: nn.Module, program: ExportedProgram) -> nn.Module:
    """A copy without the tensors that the graph does not read: a decoder's weights, moving averages."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    inputs = program.graph_signature.input_specs
    unused = {spec.target for spec in inputs if spec.target is not None and spec.arg.name not in used}
    lean = copy.deepcopy(wrapper)
    for target in unused:
        path, _, name = target.rpartition(".")
        owner = lean.get_submodule(path)
        (owner._parameters if name in owner._parameters else owner._buffers)[name] = None
    return lean


def save(program: ExportedProgram, path: str | Path) -> None:
    """Write a program: ``.pt2`` for torch.export.load, ``.onnx`` for ONNX runtimes (needs onnx and onnxscript).

    Raises:
        ValueError: another suffix; or ``.onnx`` with a program whose graph holds vqkernels' own ops (plain=False).
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path: expected to end in one of {FORMATS}, got {str(path)!r}")
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    graphs = [each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]  # nested too
    targets = {str(node.target) for each in graphs for node in each.graph.nodes}
    own = sorted(target for target in targets if target.startswith("vqkernels"))
    if own:
        raise ValueError(f"program: expected standard ops alone for ONNX (plain=True), got {', '.join(own)}")
    importlib.import_module("onnxscript")  # else torch's message is a page long
    converted = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert converted is not None
    converted.save(path)

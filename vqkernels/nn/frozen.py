"""frozen_codebook: inference over many batches, for which every quantizer's codebook is prepared once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import PreparedCodebook, prepare_codebook

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass(frozen=True, eq=False)
class Frozen:
    """A module's codebook as it was when the block was entered."""

    prepared: PreparedCodebook
    source: Tensor  # the module's own tensor, of which ``prepared`` is a snapshot
    address: int
    version: int | None  # None where torch counts none (inference tensors)

    def check(self, source: Tensor | None, name: str) -> None:
        """Raise where torch knows that the codebook has been written to, moved or replaced."""
        same = source is self.source and source.data_ptr() == self.address and _version(source) == self.version
        if not same:
            raise RuntimeError(
                f"{name}: expected the codebook unchanged inside frozen_codebook, but it was "
                "written to, moved or replaced"
            )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> Tensor:
    """-0.0 is another number than 0.0, and NaN is itself."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


class Freezable(nn.Module):
    """A quantizer whose search ``frozen_codebook`` can prepare."""

    _frozen: Frozen | None = None  # an attribute of the class: only inside the block the module has one of its own

    def _frozen_source(self) -> Tensor | None:
        """The tensor that holds the codes; None where there is no search to prepare."""
        raise NotImplementedError

    def _codes_to_freeze(self) -> tuple[Tensor, str]:
        """The codes as they are searched [K, D], and the metric."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are modules of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_frozen"}

    def _before_freezing(self) -> None:
        """Bring the codebook up to date."""

    def _refuse_frozen(self, what: str) -> None:
        """Raise inside the block."""
        if self._frozen is not None:
            name = type(self).__name__
            raise RuntimeError(f"{name}: expected no {what} inside frozen_codebook, where its codebook must not change")

    def _snapshot(self) -> PreparedCodebook | None:
        """What is searched inside the block, if the codebook is still the one of its beginning; None outside, and in a
        graph that is traced: it searches the codebook as it finds it."""
        if torch.compiler.is_compiling() or self._frozen is None:
            return None
        self._frozen.check(self._frozen_source(), type(self).__name__)
        return self._frozen.prepared


def _freeze(module: Freezable) -> None:
    module._before_freezing()
    source = module._frozen_source()
    if source is None:
        return
    rows, metric = module._codes_to_freeze()
    prepared = prepare_codebook(rows, metric=metric)
    module._frozen = Frozen(prepared, source, source.data_ptr(), _version(source))


def _compare(module: Freezable) -> None:
    """Every number, once: writes through ``.data`` or NumPy change no version."""
    frozen = module._frozen
    assert frozen is not None
    rows = module._codes_to_freeze()[0].detach()
    same = rows.shape == frozen.prepared.shape and rows.dtype == frozen.prepared.dtype
    if not (same and rows.device == frozen.prepared.device and torch.equal(_bits(rows), _bits(frozen.prepared.rows))):
        name = type(module).__name__
        raise RuntimeError(
            f"{name}: the codebook was written to inside frozen_codebook; what was searched there are the codes of its "
            "beginning"
        )


@contextmanager
def frozen_codebook(module: nn.Module) -> Iterator[None]:
    """Inference: every quantizer in ``module`` searches a codebook that was prepared once, see ``prepare_codebook``.

        with vq.frozen_codebook(model), torch.inference_mode():
            for images in loader:
                codes.append(model.encode(images))

    Codes and all other results are those that the module has outside. Opening it applies pending EMA statistics
    (unless inside ``defer_codebook_update``) and copies every codebook; a block inside another one for the same module
    costs nothing. It serves ``encode``, ``lookup`` and the forward in eval mode.

    **The codebook must not change inside.** A training forward, ``init_codebook`` and ``load_state_dict`` of a
    quantizer raise at once. After any other write that torch counts (an optimiser's step, ``copy_``, another tensor in
    its place, ``.to`` another device or dtype) the next search raises. Writes that torch does not count (``.data``,
    NumPy) reach no search: codes stay those of the block's beginning, and leaving the block, which compares every
    number once and so waits for the device, raises.

    Graphs of ``torch.compile`` and ``torch.export`` know nothing of it and search the codebook as it stands.
    ``LookupFreeQuantizer`` and ``IndexPropagationQuantizer`` with metric="dot" have no search to prepare.

    Args:
        module: a quantizer or any module that holds some; those that ``replace_quantizers`` puts in count.

    Raises:
        TypeError: no module.
        RuntimeError: as above.
        ValueError: a codebook with NaN or Inf (on CPU), named as in ``prepare_codebook``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    held = [each for each in module.modules() if isinstance(each, Freezable) and each._frozen is None]
    try:
        with torch.no_grad():
            for each in held:
                _freeze(each)
        yield
        with torch.no_grad():
            for each in held:
                if each._frozen is not None:
                    _compare(each)
    finally:
        for each in held:
            each.__dict__.pop("_frozen", None)

"""Whether a quantizer's first training step lies behind it: a flag of the process, neither state nor part of a graph.

A compiled graph may set no attribute inside a checkpointed region, and a flag on the device would have to be read. So
an op sets the attribute when it runs, on the module that it is told the number of; torch.compile guards on the
attribute and leaves the work of the first step out of the second step's graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import Tensor, nn

from ..ops._library import define
from .statistics import recomputing

_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enter(module: nn.Module) -> int:
    """A number by which ``finish_first_step_`` finds the module; every copy of it needs one of its own."""
    number = next(_numbers)
    _modules[number] = module
    return number


def _finish(_state: Tensor, number: int) -> None:
    # the recomputation of a checkpoint is no step; a module that is gone has nobody to tell
    if not recomputing() and number in _modules:
        _modules[number]._started = True


# `state` is said to change, so that no compiler drops the op or moves it before the op that wrote `state`
finish_first_step_ = define("codebook_finish_first_step_(Tensor(a!) state, int number) -> ()", _finish)

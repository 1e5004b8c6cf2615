"""Which forward this is: the first of a training run, or the recomputation of one.

A compiled graph may set no attribute inside a checkpointed region, and a flag on the device would have to be read. So
ops look and mark when they run, on the module that they are told the number of. torch.compile guards on `_started` and
leaves the work of the first forward out of later graphs. It changes once nobody needs the first graph any more: in the
first backward, where a checkpoint around the compiled module has just run that graph again, or else in the second
forward, which finds the work done.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._library import define

_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does to recompute it."""
    return torch._C._current_graph_task_id() != -1


def enter(module: nn.Module) -> int:
    """A number by which the ops find the module; every copy of it needs one of its own."""
    number = next(_numbers)
    _modules[number] = module
    return number


def first_forward(number: int) -> bool:
    """Whether the module's first training forward is running, and not again."""
    return not recomputing() and not (number in _modules and _modules[number]._first_done)


def _finish(_state: Tensor, number: int) -> None:
    module = _modules.get(number)
    if module is not None:  # else it is gone, and its graph outlived it
        module._started = module._first_done
        module._first_done = True


# `state` is said to change, so that no compiler drops the op or moves it before the op that wrote `state`
finish_first_forward_ = define("codebook_finish_first_forward_(Tensor(a!) state, int number) -> ()", _finish)

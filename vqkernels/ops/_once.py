"""A backward that may run once: asking for its derivative is an error, never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_MESSAGE = b"vqkernels: this gradient cannot be differentiated again (create_graph=True)"


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's decorator, which however takes a gradient for a constant where what came in needs none.

    There the gradient of a mean (whose own gradient is a number) would silently lack what depends on the inputs.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # no create_graph
            return found
        single = isinstance(found, Tensor)
        found = (found,) if single else found
        places = [place for place, each in enumerate(found) if isinstance(each, Tensor)]
        refuse = torch._C._functions.DelayedError(_MESSAGE, len(places))
        marked = refuse(*(found[place].detach().requires_grad_() for place in places))
        marked = marked if isinstance(marked, tuple) else (marked,)
        answers = list(found)
        for place, each in zip(places, marked, strict=True):
            answers[place] = each
        return answers[0] if single else tuple(answers)

    return once

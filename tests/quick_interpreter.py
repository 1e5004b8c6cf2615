"""Triton's interpreter without what it does again at every call of a device function: half of its time.

It puts its own functions into ``triton.language`` for a launch, and looks through all of that module again whenever one
device function calls another; and it makes a table of types for every type that it looks up. Nothing else changes.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any


def make_quick() -> None:
    """Once a process, after TRITON_INTERPRET is set."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    languages: dict[int, frozenset[str]] = {}  # of a module's globals: which of triton.language and its core it sees
    patched: set[frozenset[str]] = set()  # in the launch that runs
    types: dict[str, Any] = {}

    def languages_of(function: FunctionType) -> frozenset[str]:
        key = id(function.__globals__)
        if key not in languages:
            modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            languages[key] = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
        return languages[key]

    def patch_once(function: FunctionType) -> Any:
        seen = languages_of(function)
        if seen in patched:
            return None
        patched.add(seen)
        return patch(function)

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        try:
            return run(self, *args, **options)
        finally:
            patched.clear()

    def type_of(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        name = "pointer" if isinstance(scalar, tl.pointer_type) else scalar.name
        if name not in types:
            types[name] = look_up(scalar)
        return types[name]

    interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype = patch_once, launch, type_of

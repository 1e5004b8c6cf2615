"""Vectors of length 1, for the modules: the function itself is among the ops, which need it too."""

from ..ops.normalize import l2_normalize

__all__ = ["l2_normalize"]

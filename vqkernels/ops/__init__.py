"""Functional ops: one a file, read top to bottom: formula, schema, kernel call, gradient."""

from .codebook_stats import codebook_stats
from .ema import ema_update_
from .lookup import lookup
from .nearest import nearest
from .plain import plain_ops
from .quantize import Quantized, quantize

__all__ = ["Quantized", "codebook_stats", "ema_update_", "lookup", "nearest", "plain_ops", "quantize"]

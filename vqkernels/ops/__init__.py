"""Functional ops: one a file, read top to bottom: formula, schema, kernel call, gradient."""

from .codebook_stats import codebook_stats
from .ema import ema_update_
from .lookup import lookup
from .nearest import nearest
from .nearest_k import nearest_k
from .nearest_tokens import nearest_tokens
from .quantize import Quantized, quantize

__all__ = ["Quantized", "codebook_stats", "ema_update_", "lookup", "nearest", "nearest_k", "nearest_tokens", "quantize"]

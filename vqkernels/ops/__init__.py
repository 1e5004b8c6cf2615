"""Functional ops: one a file, read top to bottom: formula, schema, kernel call, gradient."""

from .code_cross_entropy import code_cross_entropy
from .codebook_stats import codebook_stats
from .ema import ema_update_
from .entropy_loss import EntropyLoss, entropy_loss
from .index_propagation import index_propagation
from .lookup import lookup
from .nearest import nearest
from .nearest_both import nearest_both
from .nearest_k import nearest_k
from .nearest_tokens import nearest_tokens
from .prepare_codebook import PreparedCodebook, prepare_codebook
from .quantize import Quantized, quantize
from .sample_codes import sample_codes
from .sign_assignment import sign_assignment
from .sign_codes import sign_codes, sign_rows
from .sign_entropy_loss import sign_entropy_loss
from .soft_assignment import SoftAssignment, soft_assignment

__all__ = [
    "EntropyLoss",
    "PreparedCodebook",
    "Quantized",
    "SoftAssignment",
    "code_cross_entropy",
    "codebook_stats",
    "ema_update_",
    "entropy_loss",
    "index_propagation",
    "lookup",
    "nearest",
    "nearest_both",
    "nearest_k",
    "nearest_tokens",
    "prepare_codebook",
    "quantize",
    "sample_codes",
    "sign_assignment",
    "sign_codes",
    "sign_entropy_loss",
    "sign_rows",
    "soft_assignment",
]

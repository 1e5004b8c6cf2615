"""Quantizer modules."""

from .codebook import Codebook, CodebookOptions, defer_codebook_update
from .output import QuantizerOutput
from .vector_quantizer import VectorQuantizer

__all__ = ["Codebook", "CodebookOptions", "QuantizerOutput", "VectorQuantizer", "defer_codebook_update"]

"""Quantizer modules."""

from .codebook import Codebook, CodebookOptions, defer_codebook_update
from .entropy import EntropyOptions, EntropyQuantizerOutput
from .index_propagation import IndexPropagationQuantizer
from .lookup_free import LookupFreeQuantizer
from .output import QuantizerOutput
from .vector_quantizer import VectorQuantizer

__all__ = [
    "Codebook",
    "CodebookOptions",
    "EntropyOptions",
    "EntropyQuantizerOutput",
    "IndexPropagationQuantizer",
    "LookupFreeQuantizer",
    "QuantizerOutput",
    "VectorQuantizer",
    "defer_codebook_update",
]

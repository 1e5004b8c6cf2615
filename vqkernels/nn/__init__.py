"""Quantizer modules."""

from .codebook import Codebook, CodebookOptions, defer_codebook_update
from .draws import SamplingOptions
from .entropy import EntropyOptions, EntropyQuantizerOutput
from .frozen import frozen_codebook
from .health import CodebookHealth, margin_histogram
from .index_propagation import IndexPropagationQuantizer
from .lookup_free import LookupFreeQuantizer
from .output import QuantizerOutput
from .vector_quantizer import VectorQuantizer

__all__ = [
    "Codebook",
    "CodebookHealth",
    "CodebookOptions",
    "EntropyOptions",
    "EntropyQuantizerOutput",
    "IndexPropagationQuantizer",
    "LookupFreeQuantizer",
    "QuantizerOutput",
    "SamplingOptions",
    "VectorQuantizer",
    "defer_codebook_update",
    "frozen_codebook",
    "margin_histogram",
]

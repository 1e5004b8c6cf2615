"""vqkernels: exact vector quantization in O(N + K) memory, on the fastest kernel the machine has.

Names are imported on first use, so that ``vqkernels --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .backends import BackendError, explain, use_backend
    from .compat import ReplaceReport, replace_quantizers
    from .nn import (
        EntropyOptions,
        EntropyQuantizerOutput,
        IndexPropagationQuantizer,
        LookupFreeQuantizer,
        QuantizerOutput,
        SamplingOptions,
        VectorQuantizer,
        defer_codebook_update,
        frozen_codebook,
    )
    from .nn.kmeans import KMeansResult, kmeans
    from .ops import (
        EntropyLoss,
        PreparedCodebook,
        Quantized,
        SoftAssignment,
        code_cross_entropy,
        codebook_stats,
        ema_update_,
        entropy_loss,
        index_propagation,
        lookup,
        nearest,
        nearest_both,
        nearest_k,
        nearest_tokens,
        prepare_codebook,
        quantize,
        sample_codes,
        sign_assignment,
        sign_codes,
        sign_entropy_loss,
        sign_rows,
        soft_assignment,
    )
    from .ops.plain import plain_ops

_HOMES = {
    "backends": ("BackendError", "explain", "use_backend"),
    "compat": ("ReplaceReport", "replace_quantizers"),
    "nn": (
        *("EntropyOptions", "EntropyQuantizerOutput", "IndexPropagationQuantizer", "LookupFreeQuantizer"),
        *("QuantizerOutput", "SamplingOptions", "VectorQuantizer", "defer_codebook_update", "frozen_codebook"),
    ),
    "nn.kmeans": ("KMeansResult", "kmeans"),
    "ops": (
        *("Quantized", "codebook_stats", "ema_update_", "lookup", "quantize"),
        *("nearest", "nearest_both", "nearest_k", "nearest_tokens"),
        *("EntropyLoss", "SoftAssignment", "code_cross_entropy", "entropy_loss", "index_propagation", "sample_codes"),
        *("sign_assignment", "sign_codes", "sign_entropy_loss", "sign_rows", "soft_assignment"),
        *("PreparedCodebook", "prepare_codebook"),
    ),
    "ops.plain": ("plain_ops",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BackendError",
    "EntropyLoss",
    "EntropyOptions",
    "EntropyQuantizerOutput",
    "IndexPropagationQuantizer",
    "KMeansResult",
    "LookupFreeQuantizer",
    "PreparedCodebook",
    "Quantized",
    "QuantizerOutput",
    "ReplaceReport",
    "SamplingOptions",
    "SoftAssignment",
    "VectorQuantizer",
    "__version__",
    "code_cross_entropy",
    "codebook_stats",
    "defer_codebook_update",
    "ema_update_",
    "entropy_loss",
    "explain",
    "frozen_codebook",
    "index_propagation",
    "kmeans",
    "lookup",
    "nearest",
    "nearest_both",
    "nearest_k",
    "nearest_tokens",
    "plain_ops",
    "prepare_codebook",
    "quantize",
    "replace_quantizers",
    "sample_codes",
    "sign_assignment",
    "sign_codes",
    "sign_entropy_loss",
    "sign_rows",
    "soft_assignment",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        # set every name of that module at once: importing the package `ops` also puts sub-modules with the
        # same names (nearest, quantize, ...) within reach, and the functions must be what `vqkernels.x` means
        module = importlib.import_module(f"{__name__}.{_HOME_OF[name]}")
        globals().update({each: getattr(module, each) for each in _HOMES[_HOME_OF[name]]})
        return globals()[name]
    if name in ("backends", "compat", "export", "nn", "ops", "testing", "models", "benchmarks"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Drop-ins for other libraries' quantizers, and ``replace_quantizers``, which puts them into a model.

Each has the peer's signature, return values, index shapes and state_dict, so that the model around it and its
checkpoints do not notice. One more peer is one more file here and one entry in ``registry.PEERS``.
"""

from .diffusers import VectorQuantizer
from .replace import ReplaceReport, replace_quantizers
from .taming import VectorQuantizer2
from .vector_quantize_pytorch import VectorQuantize

__all__ = ["ReplaceReport", "VectorQuantize", "VectorQuantizer", "VectorQuantizer2", "replace_quantizers"]

"""prepare_codebook: a codebook that is searched often and does not change, made ready once.

prepared = prepare_codebook(codebook)
codes, distance = nearest(x, prepared)     what nearest(x, codebook) gave at that moment, without preparing anything
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import DTYPES
from ..backends import PreparedCodebook
from ._library import check_choice, run
from .nearest import METRICS


def prepare_codebook(
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    dtype: torch.dtype | None = None,
) -> PreparedCodebook:
    """Copy a codebook and prepare it for many searches.

        prepared = vq.prepare_codebook(codebook)
        for x in batches:
            codes, distance = vq.nearest(x, prepared)    # nearest_k, quantize and lookup take it, too

    Args:
        codebook: codes [K, D]; float32, float16, bfloat16 or float64; any strides; finite.
        metric: "euclidean" or "cosine"; all searches with it have this one.
        dtype: of the snapshot, the codebook's by default; another one rounds the codes to it, once. Tokens must come in
            it (or in half precision for float32), as in ``nearest``.

    Returns:
        A ``PreparedCodebook``: a snapshot, which no later write to ``codebook`` reaches, whoever makes it, and the
        packed forms that searches need, made at once for the backend that ``nearest`` would now choose on its
        device, for any other where it is first used. It may be shared by threads, is there in forked processes, and
        can be copied and pickled. Codes are exactly those of ``nearest`` with the tensor.

    Raises:
        TypeError, ValueError: a bad argument, named. A codebook with NaN or Inf raises on CPU; on CUDA, where looking
            would wait for the device, every token gets code -1, as in ``nearest``.

    What a call saves: on CPU one read of the codebook (the fingerprint by which ``nearest`` finds its kept form) and,
    for codebooks larger than what is kept, the packing; on CUDA everything that is done to codes before the product.

    **Memory**, of a codebook of s bytes a number and Kp codes, K rounded up to whole panels (64 codes with AVX512, 16
    with AVX2) or tiles (up to 256 codes on CUDA): K D s for the snapshot, and

    * on CPU 2 Kp (D + 2) for the int16 pass (D rounded up to even), Kp (D + 12) for the byte pass (to a multiple of
      eight; as much as for int16's more, once some token needs that), 2 Kp (D + 2.5) for the int8 pass (to a multiple
      of 64), 4 Kp (D + 1) for the float32 pass; 4 K D more for 16-bit types, 8 K for cosine. 8 Kp more where the norms
      of codes differ by factors of eight and more.
      float64: nothing more, 8 K (D + 1) for cosine;
    * in Triton 2 Kp C for C columns of fp16 (D, or three times D where D <= 9, up to the next power of two, from 16;
      for D > 256 the next multiple of 64), 16 bytes for each 8 or 16 codes, 4 Kp more where the columns are full and
      8 K for cosine; twice that if small and large batches take different tiles;
    * in CUDA C++ 2 Kp C with C the next multiple of 16 from 3 D + 3 (D <= 48) or from D on (then 4 Kp more), and 4 D
      for each of some hundred blocks; float64: 8 K, and 8 K D more for cosine.

    It works on eager tensors. Inside ``torch.compile`` and ``torch.export`` a search with it is one with the snapshot.
    On CUDA, as with any tensor, work on another stream than the one it was prepared on has to wait for it.
    """
    check_choice("metric", metric, METRICS)
    _check(codebook, dtype)
    with torch.inference_mode(False), torch.no_grad():
        rows = codebook.detach().to(dtype or codebook.dtype, copy=True, memory_format=torch.contiguous_format)
    prepared = PreparedCodebook(rows, metric)
    run("nearest_prepared", rows.new_empty((1, 0, rows.shape[1])), prepared, "exact")  # no token: it packs, and no more
    return prepared


def _check(codebook: Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(codebook, Tensor):
        raise TypeError(f"codebook: expected a torch.Tensor, got {type(codebook).__name__}")
    if codebook.layout != torch.strided or codebook.is_meta:
        raise TypeError(f"codebook: expected a dense tensor with data, got {codebook.layout} on {codebook.device}")
    for name, value in (("codebook", codebook.dtype), ("dtype", dtype or codebook.dtype)):
        if value not in DTYPES:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value}")
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook: expected [K, D] with K, D >= 1, got shape {list(codebook.shape)}")

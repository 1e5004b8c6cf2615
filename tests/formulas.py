"""The formulas of search, training step and k-means in float64, as the papers write them, to test against.

Those of the softmax over a codebook are in softmax_formulas.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def code_sums(
    x: Tensor,  # [..., D]
    codes: Tensor,  # int64 [...]
    codebook_size: int,
) -> Tensor:  # float64 [K, D]
    """Sum of the tokens of each code; a negative code is none."""
    kept = codes.cpu() >= 0
    tokens = x.detach().cpu()[kept].double()
    return torch.zeros(codebook_size, x.shape[-1], dtype=torch.float64).index_add_(0, codes.cpu()[kept], tokens)


def quantize_gradients(
    x: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    codes: Tensor,  # [N]
    g: Tensor,  # [N, D]
    weight: Tensor,  # [N]
    rotation: bool,
) -> tuple[Tensor, Tensor]:  # dx [N, D], dcodebook [K, D]
    """Of <quantized, g> and the errors, each weighted; with the D x D rotation built explicitly."""
    x, codebook, g, weight = (t.double() for t in (x, codebook, g, weight))
    q = codebook[codes]
    pull = 2 * weight[:, None] * (x - q)
    dx = pull.clone()
    for n in range(len(x)):
        matrix = torch.eye(x.shape[1], dtype=torch.float64)
        if rotation:
            u, v = x[n] / x[n].norm(), q[n] / q[n].norm()
            w = (u + v) / (u + v).norm()
            matrix = q[n].norm() / x[n].norm() * (matrix - 2 * torch.outer(w, w) + 2 * torch.outer(v, u))
        dx[n] += matrix.T @ g[n]
    return dx, code_sums(-pull, codes, len(codebook))


def ema_step(
    state: list[Tensor],  # codebook [K, D], cluster_size [K], embed_sum [K, D]
    counts: Tensor,  # [K]
    sums: Tensor,  # [K, D]
    revive: Tensor,  # bool [K]
    decay: float,
    eps: float,
    normalize: bool = False,
    revived_size: float = 2.0,
) -> list[Tensor]:
    """The state after one step, written per code."""
    codebook, size, embed = (t.double().clone() for t in state)
    counts, sums = counts.double(), sums.double()

    def unit(row: Tensor) -> Tensor:
        return row / row.norm().clamp(min=1e-12) if normalize else row

    idle = counts[~revive].sum() == 0
    for k in range(len(counts)):
        if revive[k]:
            size[k], embed[k] = revived_size, unit(sums[k]) * revived_size
        elif not idle:
            size[k] = decay * size[k] + (1 - decay) * counts[k]
            embed[k] = decay * embed[k] + (1 - decay) * sums[k]
    n = size.sum()
    for k in range(len(counts)):
        if revive[k]:
            codebook[k] = unit(sums[k])
        elif not idle:
            codebook[k] = unit(embed[k] / ((size[k] + eps) / (n + len(counts) * eps) * n))
    return [codebook, size, embed]


def lloyd(
    x: Tensor,  # [N, D]
    rows: Tensor,  # [K, D]
    iterations: int,
    metric: str = "euclidean",
) -> Tensor:  # float64 [K, D]
    """Lloyd's iterations with the whole matrix of distances; no centroid may lose all its tokens."""
    x, rows = x.double(), rows.double()
    if metric == "cosine":
        x = x / x.norm(dim=1, keepdim=True)
    for _ in range(iterations):
        codes = (rows.square().sum(1) / 2 - x @ rows.T if metric == "euclidean" else -(x @ rows.T)).argmin(1)
        rows = torch.stack([x[codes == k].mean(0) for k in range(len(rows))])
        if metric == "cosine":
            rows = rows / rows.norm(dim=1, keepdim=True)
    return rows


def inertia(
    x: Tensor,  # [N, D]
    rows: Tensor,  # [K, D]
) -> float:
    """Sum of the squared distances to the nearest row."""
    return torch.cdist(x.double(), rows.double()).min(dim=1).values.square().sum().item()

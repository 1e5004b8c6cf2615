"""What the tests of vqkernels.compat compare with, and how near is near enough."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn

import vqkernels.testing

UNIT = 2.0**-24  # float32's unit roundoff


class TamingQuantizer(nn.Module):
    """The published contract of taming-transformers' VectorQuantizer2, written down anew."""

    def __init__(self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1 / n_e, 1 / n_e)
        self.remap, self.sane_index_shape, self.re_embed = remap, sane_index_shape, n_e
        if remap is not None:
            self.register_buffer("used", torch.tensor(numpy.load(remap)))
            self.unknown_index = len(self.used) if unknown_index == "extra" else unknown_index
            self.re_embed = len(self.used) + (unknown_index == "extra")

    def forward(self, z: Tensor, temp=None, rescale_logits=False, return_logits=False):  # [B, D, H, W]
        z = z.movedim(1, -1)
        flat, rows = z.reshape(-1, self.e_dim), self.embedding.weight
        indices = (flat.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * flat @ rows.T).argmin(1)
        z_q = self.embedding(indices).view(z.shape)
        to_encoder, to_codebook = (z_q.detach() - z).square().mean(), (z_q - z.detach()).square().mean()
        loss = to_encoder + self.beta * to_codebook if self.legacy else self.beta * to_encoder + to_codebook
        z_q = (z + (z_q - z).detach()).movedim(-1, 1).contiguous()
        if self.remap is not None:
            indices = torch.tensor([self._place(code) for code in indices.tolist()])[:, None]
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[:3])
        return z_q, loss, (None, None, indices)

    def _place(self, code: int) -> int:
        used, other = self.used.tolist(), self.unknown_index
        other = torch.randint(self.re_embed, ()).item() if other == "random" else other
        return used.index(code) if code in used else other

    def get_codebook_entry(self, indices: Tensor, shape):
        if self.remap is not None:
            indices = self.used[torch.where(indices.flatten() >= len(self.used), 0, indices.flatten())]
        z_q = self.embedding(indices)
        return z_q if shape is None else z_q.view(shape).movedim(-1, 1).contiguous()


def assert_codes_equal_but_for_farther(
    theirs: Tensor,  # int64 [N]
    ours: Tensor,  # int64 [N]
    tokens: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    metric: str = "euclidean",
) -> int:
    """Ours are the nearest, and differ only where the peer's code is farther or tied; how often it is farther."""
    vqkernels.testing.assert_codes_nearest(ours, tokens, codebook, metric)
    differs = theirs != ours
    farther = torch.zeros_like(differs)
    farther[differs] = vqkernels.testing.wrong_codes(theirs[differs], tokens[differs], codebook, metric)
    rows, wide = codebook.double()[torch.stack([theirs, ours])], tokens.double()
    if metric == "euclidean":
        distance = (wide - rows).square().sum(-1)
    else:
        distance = 1 - torch.cosine_similarity(wide.expand_as(rows), rows, dim=-1)
    assert (distance[0] - distance[1] >= -1e-12 * distance.amax()).all()  # the same by another way, in float64
    assert (theirs == ours)[~farther].all()  # no ties in these data
    return int(farther.sum())


def row_tolerance(tokens: Tensor, codebook: Tensor, *, rotation: bool) -> float:
    """Between a code row and what the peer makes of it.

    z + (row - z): a subtraction and a sum, each rounded. The rotation: three dot products of D terms, three norms,
    and a dozen products, of numbers no larger than the longer of the two vectors.
    """
    if not rotation:
        return 2 * UNIT * float(tokens.abs().max() + codebook.abs().max())
    dim = codebook.shape[1]
    return (6 * dim + 20) * UNIT * float(torch.cat([tokens.reshape(-1, dim), codebook]).norm(dim=1).max())


def mean_tolerance(terms: int, largest: float) -> float:
    """Between two means of as many squares, each added up in any order (Higham 2002, 3.5)."""
    return 2 * vqkernels.testing.sum_tolerance(terms, torch.float32, largest) / terms

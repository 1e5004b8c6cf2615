"""``vqkernels.nearest_tokens``: for every code its true nearest token."""

from __future__ import annotations

import pytest
import torch
from adversarial import Case, cases, true_nearest
from quantizers import randn
from torch.utils._python_dispatch import TorchDispatchMode

import vqkernels as vq

ALL = [(metric, case) for metric in ("euclidean", "cosine") for case in cases(metric)]


def truth(case: Case, keep: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """By the oracle of ``nearest`` with the roles exchanged, over the tokens to keep."""
    places = keep.nonzero()[:, 0]
    if not len(places):
        return torch.full((len(case.codebook),), -1), torch.full((len(case.codebook),), float("nan"))
    index, distance = true_nearest(case.codebook, case.x[places], metric)
    return places[index], distance


@pytest.mark.parametrize(("metric", "case"), ALL, ids=str)
def test_the_index_is_that_of_the_true_nearest_token(backend, metric: str, case: Case):
    name, device = backend
    if name == "triton" and (case.x.dtype == torch.float64 or case.x.numel() * len(case.codebook) > 8_000):
        return  # float64 it does not take, as nearest's tests show; and the interpreter takes its time
    if name == "triton" and device == "cpu" and case.name == "cosine-dim-1":
        case = Case(case.name, case.x[:8], case.codebook[:12])  # all of them tie, and are decided one by one
    x, codebook = case.x.to(device), case.codebook.to(device)
    finite = case.x.isfinite().all(1)
    index, distance = vq.nearest_tokens(x, codebook, metric=metric)
    true, true_distance = truth(case, finite, metric)
    assert torch.equal(index.cpu(), true)
    absolute = 2.0**-46 if metric == "cosine" else 0.0
    torch.testing.assert_close(distance.cpu(), true_distance, rtol=2.0**-22, atol=absolute, equal_nan=True)


def test_masked_and_bad_tokens_are_nobodys_nearest(backend):
    _, device = backend
    x, codebook = randn(3, 13, 4).to(device), randn(9, 4, seed=1).to(device)
    x[0] = codebook[0]  # ties: the lowest that is real
    x[1, 4] = float("nan")
    mask = torch.rand(3, 13, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[0, :3] = False
    index, distance = vq.nearest_tokens(x, codebook, mask=mask.to(device))
    keep = (mask & x.cpu().isfinite().all(-1)).flatten()
    true, true_distance = truth(Case("masked", x.cpu().reshape(-1, 4), codebook.cpu()), keep, "euclidean")
    assert torch.equal(index.cpu(), true)
    assert index[0] == mask[0].long().argmax()
    torch.testing.assert_close(distance.cpu(), true_distance)


def test_no_token_and_codes_that_are_not_finite(backend):
    _, device = backend
    x, codebook = randn(6, 4).to(device), randn(5, 4, seed=1).to(device)
    nobody = torch.zeros(6, dtype=torch.bool, device=device)
    for index, distance in (
        vq.nearest_tokens(x[:0], codebook),
        vq.nearest_tokens(x, codebook, mask=nobody),
        vq.nearest_tokens(x * float("nan"), codebook),
    ):
        assert (index == -1).all()
        assert distance.isnan().all()
        assert distance.dtype == torch.float32
    codebook[2, 1] = float("inf")
    index, distance = vq.nearest_tokens(x, codebook)
    assert (index == -1).tolist() == [False, False, True, False, False]
    assert distance.isnan().tolist() == [False, False, True, False, False]


def test_strides_half_tokens_and_threads():
    image, codebook = randn(2, 8, 9, 7).bfloat16(), randn(300, 8, seed=1)
    x = image.permute(0, 2, 3, 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(vq.nearest_tokens(x, codebook))
    true, _ = true_nearest(codebook, x.reshape(-1, 8).float())
    assert torch.equal(found[0][0], true)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "_unique")), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_and_it_compiles():
    from vqkernels.ops import nearest_tokens as op

    module = __import__("sys").modules[op.__module__]
    x, codebook, mask = randn(2, 20, 4), randn(7, 4, seed=1), randn(2, 20) > 0
    with vq.use_backend("compiled"), NoWaiting():
        module._run(x, codebook, mask, "euclidean")
    torch.library.opcheck(module._nearest_tokens, (x, codebook, mask, "euclidean"))
    compiled = torch.compile(lambda x: op(x, codebook, mask=mask)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), op(x, codebook, mask=mask)[0])


def test_bad_arguments_are_named():
    x, codebook = randn(5, 4), randn(3, 4)
    with pytest.raises(ValueError, match=r"mask: expected bool \[5\]"):
        vq.nearest_tokens(x, codebook, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="metric: expected one of"):
        vq.nearest_tokens(x, codebook, metric="dot")
    with pytest.raises(TypeError, match="codebook: expected"):
        vq.nearest_tokens(x, codebook.half())

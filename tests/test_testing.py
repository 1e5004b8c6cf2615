"""vqkernels.testing tells a wrong code from a tied one."""

from __future__ import annotations

import pytest
import torch

import vqkernels as vq
from vqkernels.testing import assert_codes_nearest, sum_tolerance, true_codes, wrong_codes

X = torch.tensor([[0.0, 0.0], [2.5, 0.1], [float("nan"), 0.0]])
CODEBOOK = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [1.0, 0.0]])


def test_true_codes_ignore_the_backend_in_force():
    with vq.use_backend("triton"):
        assert true_codes(X, CODEBOOK).tolist() == [0, 2, -1]


def test_a_tie_is_not_wrong_but_a_farther_code_is():
    assert wrong_codes(torch.tensor([0, 2, -1]), X, CODEBOOK).tolist() == [False, False, False]
    assert wrong_codes(torch.tensor([3, 0, -1]), X, CODEBOOK).tolist() == [False, True, False]
    assert wrong_codes(torch.tensor([1, 3, 0]), X, CODEBOOK).tolist() == [False, True, True]
    assert wrong_codes(torch.tensor([2, 9, -1]), X, CODEBOOK).tolist() == [True, True, False]


def test_a_tie_of_cosines_is_not_wrong():
    codebook = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    x = torch.tensor([[3.0, 3.0], [1.0, 0.1]])
    assert wrong_codes(torch.tensor([1, 2]), x, codebook, "cosine").tolist() == [False, False]
    assert wrong_codes(torch.tensor([2, 1]), x, codebook, "cosine").tolist() == [True, True]


def test_the_assertion_names_the_first_wrong_code():
    assert_codes_nearest(torch.tensor([0, 2, -1]), X, CODEBOOK)
    assert_codes_nearest(torch.tensor([3, 2, -1]), X, CODEBOOK, allow_ties=True)
    with pytest.raises(AssertionError, match=r"1 of 3 codes are not the nearest; first at \[0\]: 3, not 0"):
        assert_codes_nearest(torch.tensor([3, 2, -1]), X, CODEBOOK)
    with pytest.raises(AssertionError, match=r"first at \[1\]: 0, not 2"):
        assert_codes_nearest(torch.tensor([3, 0, -1]), X, CODEBOOK, allow_ties=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_stays_within_its_tolerance(dtype: torch.dtype):
    values = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.zeros((), dtype=dtype)
    for value in values:
        total = total + value
    error = abs(total.double() - values.double().sum())
    assert 0 < error <= sum_tolerance(300, dtype)

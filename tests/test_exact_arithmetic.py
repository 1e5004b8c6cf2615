"""csrc/exact.h, compiled by itself: comparisons and cosines agree with fractions over the whole range of the types."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from fractions import Fraction

import pytest
import torch
from requirements import skip_or_fail
from torch import Tensor

from vqkernels import _extension

EXACT_SOURCE = """
#include "exact.h"
using namespace vqkernels::exact;
template <class T>
static double cosine_of(const T* x, const T* c, int64_t dim) {
  return cosine(x, 1, scale_vector(x, 1, dim), c, 1, scale_vector(c, 1, dim), dim).hi;
}
extern "C" {
int compare_float(const float* x, const float* a, const float* b, int64_t dim) {
  return compare_euclidean(x, 1, a, 1, b, 1, dim);
}
int compare_double(const double* x, const double* a, const double* b, int64_t dim) {
  return compare_euclidean(x, 1, a, 1, b, 1, dim);
}
double cosine_float(const float* x, const float* c, int64_t dim) { return cosine_of(x, c, dim); }
double cosine_double(const double* x, const double* c, int64_t dim) { return cosine_of(x, c, dim); }
}
"""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("exact")
    (folder / "exact.cpp").write_text(EXACT_SOURCE)
    compiler = shutil.which("c++")
    if compiler is None:
        skip_or_fail("compiled", "no c++ on PATH")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    target = folder / "exact.so"
    command = [compiler, *flags, f"-I{_extension.source_root()}", str(folder / "exact.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    for name in ("cosine_float", "cosine_double"):
        getattr(library, name).restype = ctypes.c_double
    return library


def _awkward(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of few bits over the whole range of ``dtype``, so that sums cancel and ties happen."""
    low, high = (-149, 127) if dtype == torch.float32 else (-1074, 1023)
    exponent = torch.randint(low, high, (count,), generator=generator)
    exponent = torch.where(torch.rand(count, generator=generator) < 0.7, exponent % 3, exponent)
    small = torch.randint(-4, 5, (count,), generator=generator).double()
    return torch.ldexp(small / 4, exponent).to(dtype)


def _pointer(values: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_comparison_agrees_with_fractions(exact: ctypes.CDLL, dtype: torch.dtype):
    compare = exact.compare_float if dtype == torch.float32 else exact.compare_double
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(600):
        dim = 1 + trial % 5
        x, a, b = (_awkward(dim, dtype, generator) for _ in range(3))
        if trial % 3 == 0:
            x, b = x[:1].expand(dim).clone(), a.flip(0)  # a permutation seen from a constant token: a tie
        true = _square_difference(x, a, b)
        sign = compare(_pointer(x), _pointer(a), _pointer(b.contiguous()), ctypes.c_int64(dim))
        assert sign == (true > 0) - (true < 0)
        seen.add(sign)
    assert seen == {-1, 0, 1}


def _square_difference(x: Tensor, a: Tensor, b: Tensor) -> Fraction:
    triples = zip(x.tolist(), a.tolist(), b.tolist(), strict=True)
    return sum(
        ((Fraction(t) - Fraction(p)) ** 2 - (Fraction(t) - Fraction(q)) ** 2 for t, p, q in triples),
        Fraction(0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_is_right_at_any_scale(exact: ctypes.CDLL, dtype: torch.dtype):
    cosine = exact.cosine_float if dtype == torch.float32 else exact.cosine_double
    scales = (1e-44, 1.0, 1e37) if dtype == torch.float32 else (1e-320, 1.0, 1e307)
    for scale in scales:
        x = torch.tensor([3.0, 0.0, 4.0], dtype=dtype) * scale
        c = torch.tensor([0.0, 5.0, 5.0], dtype=dtype)
        a, b = [Fraction(v) for v in x.tolist()], [Fraction(v) for v in c.tolist()]
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        true = float(dot * dot / (sum(p * p for p in a) * sum(q * q for q in b))) ** 0.5
        assert cosine(_pointer(x), _pointer(c), ctypes.c_int64(3)) == pytest.approx(true, rel=2e-16)
        assert cosine(_pointer(x), _pointer(c * 0), ctypes.c_int64(3)) == 0.0

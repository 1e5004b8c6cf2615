"""Who can find the nearest code: ours by backend, what users write in torch, and the libraries they would pick."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.kernels import compiled
from vqkernels.ops import nearest, prepare_codebook

from .machine import environment
from .plain import blocked_argmin
from .problem import Problem, make_problem
from .providers import Call, Provider, Unavailable, register

# distance_compute_blas_threshold, _query_bs, _database_bs: 1, because batches below the threshold take a slow path;
# block sizes other than the default 4096 x 1024 won by a few percent at some shapes
FAISS_SETTINGS = ((1, 4096, 1024), (1, 1024, 1024), (1, 256, 4096))
WIDE = ("float32", "float64")


def search_with(
    backend: str | None,
    problem: Problem,
    *,
    precision: str = "exact",
    switches: dict[str, str] | None = None,
) -> Call:
    """``vqkernels.nearest`` on one backend, or on the one that it picks by itself, under environment variables."""

    def run() -> Tensor:
        with use_backend(backend):
            return nearest(problem.x, problem.codebook, precision=precision)[0]

    if not switches:
        return run

    def run_switched() -> Tensor:
        try:
            with environment(switches):
                return run()
        except RuntimeError as error:
            if str(error).startswith("VQKERNELS_"):  # this CPU lacks what the variable asks for
                raise Unavailable(str(error)) from error
            raise

    return run_switched


def search_prepared(problem: Problem) -> Call:
    """``vqkernels.nearest`` on the compiled backend with a codebook that was prepared before, outside the timing."""
    if problem.changing:
        raise Unavailable("the codebook changes from call to call: there is nothing to prepare")
    with use_backend("compiled"):
        prepared = prepare_codebook(problem.codebook)

    def run() -> Tensor:
        with use_backend("compiled"):
            return nearest(problem.x, prepared)[0]

    return run


def plain_kernel(problem: Problem) -> Call:
    """The C++ kernel without its certificate, on ordinary numbers of the problem's shape: nothing delays it."""
    ordinary = make_problem("search", problem.shape, dtype=str(problem.x.dtype).removeprefix("torch."))
    search = search_with("compiled", ordinary, precision="fast")

    def run() -> None:
        search()

    return run


def compiled_report(problem: Problem, *, switches: dict[str, str] | None = None) -> dict[str, Any] | None:
    """Which coarse pass ran and what it left to do, as ``nearest_report`` tells it; None on CUDA."""
    if problem.x.is_cuda:
        return None
    with environment(switches or {}):
        report = compiled.nearest_report(problem.x[None], problem.codebook, "euclidean", "exact")
    return {
        "coarse_pass": report.coarse_pass,
        "instruction_set": report.instruction_set,
        "certified_percent": 100 * report.certified / report.tokens,
        "candidates": report.candidates,
        "refined": report.refined,
        "scanned": report.scanned,
    }


def half_squares(codebook: Tensor) -> Tensor:  # codebook [K, D] -> [K]
    """|c|^2 / 2."""
    return codebook.square().sum(dim=1) / 2


def addmm_scores(x: Tensor, codebook: Tensor) -> Tensor:  # x [N, D], codebook [K, D] -> [N, K]
    """|c|^2 / 2 - x.c: the squared distance but for what is the same for every code."""
    return torch.addmm(half_squares(codebook), x, codebook.t(), alpha=-1)


def expanded_scores(x: Tensor, codebook: Tensor) -> Tensor:  # x [N, D], codebook [K, D] -> [N, K]
    """|x|^2 + |c|^2 - 2 x.c: the line of nearly every public VQ layer."""
    return x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1) - 2 * x @ codebook.t()


def torch_cdist(problem: Problem) -> Call:
    """``torch.cdist`` and ``argmin``."""
    return lambda: torch.cdist(problem.x, problem.codebook).argmin(dim=1)


def torch_expanded(problem: Problem) -> Call:
    """The expanded form and ``argmin``."""
    return lambda: expanded_scores(problem.x, problem.codebook).argmin(dim=1)


def torch_expanded_bf16(problem: Problem) -> Call:
    """The expanded form as it runs inside a training loop under bfloat16 autocast."""

    def run() -> Tensor:
        with torch.autocast(problem.x.device.type, dtype=torch.bfloat16):
            return expanded_scores(problem.x, problem.codebook).argmin(dim=1)

    return run


def torch_addmm(problem: Problem) -> Call:
    """One ``addmm`` and ``argmin``: the quickest short form in torch."""
    return lambda: addmm_scores(problem.x, problem.codebook).argmin(dim=1)


def torch_chunked(problem: Problem) -> Call:
    """``addmm`` and ``argmin`` over blocks of tokens whose scores stay in cache."""
    return lambda: blocked_argmin(problem.x, problem.codebook)


def compiled_by_torch(function: Callable[..., Any], problem: Problem) -> Callable[[], Any]:
    """``torch.compile`` of a function of x and codebook; compiling is not timed."""
    torch._dynamo.reset()
    options: dict[str, Any] = {}
    if not problem.x.is_cuda:
        options["cpp.threads"] = torch.get_num_threads()  # otherwise those of the first compilation stay
    search = torch.compile(function, options=options)
    try:
        search(problem.x, problem.codebook)
    except Exception as error:
        raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0]}") from error
    return lambda: search(problem.x, problem.codebook)


def torch_compiled(problem: Problem) -> Call:
    """``torch.compile`` of ``addmm`` and ``argmin``."""
    return compiled_by_torch(lambda x, codebook: addmm_scores(x, codebook).argmin(dim=1), problem)


def set_faiss(settings: tuple[int, int, int]) -> None:
    """faiss's block sizes, for the whole process."""
    import faiss

    variables = faiss.cvar
    variables.distance_compute_blas_threshold, variables.distance_compute_blas_query_bs = settings[:2]
    variables.distance_compute_blas_database_bs = settings[2]


def faiss_flat(problem: Problem) -> Call:
    """faiss ``IndexFlatL2``, k = 1, at the quickest of ``FAISS_SETTINGS``; ``knn`` where the codebook changes."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    tokens, codebook = problem.x.contiguous().numpy(), problem.codebook.contiguous().numpy()
    index = faiss.IndexFlatL2(problem.shape.dim)
    if not problem.changing:
        index.add(codebook)  # a copy of the codebook, outside the timing

    def search(settings: tuple[int, int, int]) -> Any:  # int64 [N, 1]
        set_faiss(settings)
        return (faiss.knn(tokens, codebook, 1) if problem.changing else index.search(tokens, 1))[1]

    def seconds(settings: tuple[int, int, int]) -> float:
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            search(settings)
            samples.append(time.perf_counter() - start)
        return min(samples)

    best = min(FAISS_SETTINGS, key=seconds)
    return lambda: torch.from_numpy(search(best)[:, 0])


def sklearn_argmin(problem: Problem) -> Call:
    """scikit-learn ``pairwise_distances_argmin`` (float64 inside)."""
    from sklearn.metrics import pairwise_distances_argmin

    tokens, codebook = problem.x.numpy(), problem.codebook.numpy()
    return lambda: torch.from_numpy(pairwise_distances_argmin(tokens, codebook).astype("int64"))


def _register_ours() -> None:
    for backend in ("compiled", "triton", "reference"):
        explain = compiled_report if backend == "compiled" else None
        prepare = partial(search_with, backend)
        register(Provider(f"vqkernels-{backend}", "search", prepare, ours=True, explain=explain))
    register(
        Provider(
            "vqkernels-compiled-prepared",
            "search",
            search_prepared,
            ours=True,
            optional=True,
            note="the codebook prepared once, by prepare_codebook",
            explain=compiled_report,
        )
    )
    automatic = "the backend that vqkernels picks by itself"
    register(Provider("vqkernels", "search", partial(search_with, None), ours=True, optional=True, note=automatic))


def _register_switched() -> None:
    """The C++ kernels held to one instruction set or pass, and without their certificate."""
    for word, switches in (
        ("avx2", {"VQKERNELS_CPU_ISA": "avx2"}),
        ("portable", {"VQKERNELS_CPU_ISA": "portable"}),
        ("float32", {"VQKERNELS_CPU_PASS": "float32"}),
    ):
        register(
            Provider(
                f"vqkernels-compiled-{word}",
                "search",
                partial(search_with, "compiled", switches=switches),
                ours=True,
                optional=True,
                devices=("cpu",),
                note=" ".join(f"{name}={value}" for name, value in switches.items()),
                explain=partial(compiled_report, switches=switches),
            )
        )
    register(
        Provider(
            "vqkernels-compiled-fast",
            "search",
            partial(search_with, "compiled", precision="fast"),
            ours=True,
            yardstick=True,
            optional=True,
            note='precision="fast": one pass in fp32, inexact',
        )
    )
    register(
        Provider(
            "vqkernels-compiled-plain",
            "search",
            plain_kernel,
            ours=True,
            yardstick=True,
            optional=True,
            devices=("cpu",),
            note='precision="fast" on N(0,1) numbers of the same shape, whatever the data',
        )
    )


def _register_torch() -> None:
    register(Provider("torch-cdist", "search", torch_cdist, dtypes=WIDE, bytes_per_score=4, note="cdist + argmin"))
    register(Provider("torch-expanded", "search", torch_expanded, bytes_per_score=12, note="x^2 + c^2 - 2xc"))
    register(
        Provider(
            "torch-expanded-bf16",
            "search",
            torch_expanded_bf16,
            dtypes=("float32",),
            bytes_per_score=12,
            note="x^2 + c^2 - 2xc under bf16 autocast",
        )
    )
    register(Provider("torch-addmm", "search", torch_addmm, bytes_per_score=4, note="addmm + argmin"))
    register(Provider("torch-chunked", "search", torch_chunked, note="addmm + argmin over blocks of tokens"))
    register(
        Provider("torch-compile", "search", torch_compiled, bytes_per_score=4, note="torch.compile(addmm + argmin)")
    )


def _register_libraries() -> None:
    register(
        Provider(
            "faiss",
            "search",
            faiss_flat,
            package="faiss",
            install="faiss-cpu",
            devices=("cpu",),
            dtypes=("float32",),
            note="IndexFlatL2 (knn where the codebook changes), the quickest of three settings",
        )
    )
    register(
        Provider(
            "sklearn",
            "search",
            sklearn_argmin,
            package="sklearn",
            install="scikit-learn",
            devices=("cpu",),
            dtypes=WIDE,
            note="pairwise_distances_argmin",
        )
    )


_register_ours()
_register_switched()
_register_torch()
_register_libraries()

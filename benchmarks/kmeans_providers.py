"""Who can run Lloyd's iterations: all from the same centroids and on all tokens; each returns its centroids.

What is counted is the clustering alone, no last pass for codes: that is what every one of them calls its fit or train.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.nn.kmeans import kmeans

from .plain import lloyd_step
from .problem import Problem
from .providers import Call, Provider, register
from .search_providers import FAISS_SETTINGS, set_faiss

FAISS_TRIAL = 65536  # tokens on which faiss's block sizes are tried
HALF_AND_SINGLE = ("float32", "float16", "bfloat16")


def ours(backend: str, problem: Problem) -> Call:
    """``vqkernels.kmeans`` on one backend."""
    start = problem.codebook.float()

    def run() -> Tensor:
        with use_backend(backend):
            found = kmeans(problem.x, len(start), init=start, iterations=problem.iterations, assign=False)
        return found.centroids

    return run


def torch_chunked(problem: Problem) -> Call:
    """``addmm`` and ``argmin`` over blocks of tokens, ``index_add_`` for the sums."""
    x = problem.x.float()

    def run() -> Tensor:
        rows = problem.codebook.float()
        for _ in range(problem.iterations):
            rows = lloyd_step(x, rows)
        return rows

    return run


def faiss_kmeans(problem: Problem) -> Call:
    """``faiss.Kmeans`` on all tokens, one run, at the quickest of ``FAISS_SETTINGS``."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    tokens, start = problem.x.contiguous().numpy(), problem.codebook.contiguous().numpy()
    size, dim = start.shape
    index = faiss.IndexFlatL2(dim)
    index.add(start)

    def seconds(settings: tuple[int, int, int]) -> float:
        set_faiss(settings)
        begin = time.perf_counter()
        index.search(tokens[:FAISS_TRIAL], 1)
        return time.perf_counter() - begin

    best = min(FAISS_SETTINGS, key=lambda settings: min(seconds(settings) for _ in range(3)))
    options: dict[str, Any] = {"niter": problem.iterations, "nredo": 1}
    options |= {"max_points_per_centroid": len(tokens), "min_points_per_centroid": 1}

    def run() -> Tensor:
        set_faiss(best)
        clustering = faiss.Kmeans(dim, size, **options)
        clustering.train(tokens, init_centroids=start)
        return torch.from_numpy(clustering.centroids)

    return run


def sklearn_kmeans(mini_batch: bool, problem: Problem) -> Call:
    """scikit-learn's ``KMeans``, or as many passes of its ``MiniBatchKMeans``."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    tokens, start = problem.x.numpy(), problem.codebook.numpy()

    def run() -> Tensor:
        kind = MiniBatchKMeans if mini_batch else KMeans
        clustering = kind(len(start), init=start, n_init=1, max_iter=problem.iterations, tol=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            clustering.fit(tokens)
        return torch.from_numpy(clustering.cluster_centers_)

    return run


def _register_ours() -> None:
    for backend in ("compiled", "triton", "reference"):
        prepare = partial(ours, backend)
        register(Provider(f"vqkernels-{backend}", "kmeans", prepare, ours=True, dtypes=HALF_AND_SINGLE))


def _register_peers() -> None:
    single, cpu = ("float32",), ("cpu",)
    plain = "addmm + argmin over blocks, index_add_"
    register(Provider("torch-chunked", "kmeans", torch_chunked, dtypes=HALF_AND_SINGLE, note=plain))
    register(
        Provider(
            "faiss",
            "kmeans",
            faiss_kmeans,
            package="faiss",
            install="faiss-cpu",
            devices=cpu,
            dtypes=single,
            note="faiss.Kmeans, all tokens, one run, the quickest of three settings",
        )
    )
    for name, mini_batch in (("sklearn", False), ("sklearn-mini-batch", True)):
        register(
            Provider(
                name,
                "kmeans",
                partial(sklearn_kmeans, mini_batch),
                package="sklearn",
                install="scikit-learn",
                devices=cpu,
                dtypes=single,
                yardstick=mini_batch,
                optional=mini_batch,
                note="MiniBatchKMeans: another algorithm, as many passes" if mini_batch else "KMeans(algorithm=lloyd)",
            )
        )


_register_ours()
_register_peers()

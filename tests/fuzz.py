"""Random searches on every backend, compared with each other and with exact arithmetic.

    python tests/fuzz.py --cases 2000 --seed 0        all of them; exits with 1 if any two answers differ
    python tests/fuzz.py --seed 0 --only 137          one of them again

A case is a shape, a distribution, dtypes, a metric and a memory layout, all drawn from (seed, number). It is searched
by the reference, by Triton where it is small enough (in its interpreter, or on a GPU) and by the C++ kernels with every
instruction set that this CPU has, in either coarse pass and on one or two threads, each also with a prepared codebook;
codes must be equal, distances too but for their last bit. Some are searched for rows and columns at once, too. Then the
codebook may be changed in place, up to three times, and everything is searched again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from adversarial import true_nearest
from fuzz_inputs import (
    CHANGES,
    CODE_LAYOUTS,
    DISTRIBUTIONS,
    DTYPES,
    TIED,
    TOKEN_LAYOUTS,
    Change,
    draw_shape,
    to_dtype,
)
from numpy.random import Generator
from torch import Tensor

import vqkernels as vq
from vqkernels._extension import instruction_set
from vqkernels.backends import candidates

ISAS = ("avx512", "avx2", "portable")
PASSES = ("byte", "int8", "int16", "float32", None)  # None: as the kernel chooses
ORACLE_ELEMENTS = 300_000  # K D times the tokens that one case asks exact arithmetic about
INTERPRETED_ELEMENTS = 16_000  # N K D that the interpreter is given
INTERPRETED_TOKENS = 16  # one that the coarse pass does not prove costs it tens of milliseconds
INTERPRETED_TIES = 12  # and so does each pair that float64 cannot separate
INTERPRETED_SHARE = 0.7  # of the cases that small; a call takes 0.1 to 0.5 s
PREPARED_SHARE = 0.5  # of the cases that a run with a prepared codebook takes
BOTH_SHARE = 0.4  # of the searches, in which ``nearest_both`` is asked too
ANGLE = 2.0**-46  # 1 - cos cancels: float64's error of a cosine stays


@dataclass(frozen=True)
class Run:
    """One way to search."""

    backend: str
    device: str = "cpu"
    isa: str | None = None
    coarse_pass: str | None = None
    threads: int = 1
    prepared: bool = False  # with a prepared codebook, whose original is then overwritten

    def __str__(self) -> str:
        how = "prepared, " if self.prepared else ""
        if self.isa is None:
            return f"{how}{self.backend} on {self.device}"
        return f"{how}{self.backend}, {self.isa}, {self.coarse_pass or 'automatic'} pass, threads {self.threads}"


@dataclass
class Problem:
    """One case."""

    number: int
    metric: str
    distribution: str
    x: Tensor  # [..., D]
    codebook: Tensor  # [K, D]
    changes: list[Change]
    layouts: str
    runs: list[Run]
    inference: bool
    done: list[str] = field(default_factory=list)  # names of the changes so far

    def __str__(self) -> str:
        shape = f"x {list(self.x.shape)} {str(self.x.dtype)[6:]}, codebook {list(self.codebook.shape)}"
        after = f", codebook changed: {', then '.join(self.done)}" if self.done else ""
        mode = ", inference mode" if self.inference else ""
        return (
            f"case {self.number}: {self.metric}, {self.distribution}, {shape} {str(self.codebook.dtype)[6:]}, "
            f"{self.layouts}{mode}{after}"
        )


Answer = tuple[Tensor, Tensor]  # codes int64 [N], distance float32 [N]


# ------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def settings(run: Run) -> Iterator[None]:
    """Backend, instruction set, coarse pass and threads of one run."""
    wanted = {"VQKERNELS_CPU_ISA": run.isa, "VQKERNELS_CPU_PASS": run.coarse_pass}
    before, threads = {name: os.environ.get(name) for name in wanted}, torch.get_num_threads()
    _set_environment(wanted)
    torch.set_num_threads(run.threads)
    try:
        with vq.use_backend(run.backend):
            yield
    finally:
        _set_environment(before)
        torch.set_num_threads(threads)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def available_runs() -> list[Run]:
    """Reference, Triton and one run an instruction set, with whatever this machine has."""
    runs = [Run("reference")]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        probe = torch.zeros(1, 1, 1, device=device)
        reasons = {c.backend: c.reason for c in candidates("nearest", probe, probe[0], "euclidean", "exact")}
        runs += [Run("triton", device)] if reasons["triton"] is None else []
        if reasons["compiled"] is None:
            runs += [Run("compiled", isa=isa) for isa in ISAS if _has(isa)] if device == "cpu" else []
            runs += [Run("compiled", "cuda")] if device == "cuda" else []
    return runs + [replace(run, prepared=True) for run in runs]


def _has(isa: str) -> bool:
    with settings(Run("compiled", isa=isa)):
        return instruction_set() == isa


def search(run: Run, problem: Problem) -> Answer | str:
    """Codes and distances, or the error in words."""
    try:
        with settings(run):
            x, codebook = problem.x.to(run.device), problem.codebook.to(run.device)
            if run.prepared:
                codebook = _prepared(codebook, problem.metric)
            codes, distance = vq.nearest(x, codebook, metric=problem.metric)
        return codes.flatten().cpu(), distance.flatten().cpu()
    except Exception as error:  # whatever it is, it is a failure of this run
        return f"{type(error).__name__}: {error}"


def search_both(run: Run, problem: Problem) -> Answer | str:
    """The same of the tokens, and then of the codes among the tokens."""
    try:
        with settings(run):
            x, codebook = problem.x.to(run.device), problem.codebook.to(run.device)
            found = vq.nearest_both(x, codebook, metric=problem.metric)
        codes, distance, tokens, token_distance = (part.flatten().cpu() for part in found)
        return torch.cat([codes, tokens]), torch.cat([distance, token_distance])
    except Exception as error:  # whatever it is, it is a failure of this run
        return f"{type(error).__name__}: {error}"


def _prepared(codebook: Tensor, metric: str) -> vq.PreparedCodebook:  # [K, D]
    """A snapshot of a codebook that is then gone."""
    codebook = torch.empty_strided(
        codebook.shape, codebook.stride(), dtype=codebook.dtype, device=codebook.device
    ).copy_(codebook)
    prepared = vq.prepare_codebook(codebook, metric=metric)
    codebook.fill_(float("nan"))
    return prepared


# --------------------------------------------------------------------------------------------- cases


def make_problem(seed: int, number: int, runs: list[Run]) -> Problem:
    """The case of that number: the same on every machine but for which runs there are."""
    rng = np.random.default_rng([seed, number])
    distribution = str(rng.choice(list(DISTRIBUTIONS)))
    metric = "cosine" if rng.random() < 0.35 else "euclidean"
    pairs, weights = list(DTYPES), np.array(list(DTYPES.values()), dtype=float)
    x_type, code_type = pairs[rng.choice(len(pairs), p=weights / weights.sum())]
    n, k, d = draw_shape(rng, distribution in TIED, cosine=metric == "cosine")
    with np.errstate(all="ignore"):
        x, codebook = DISTRIBUTIONS[distribution](rng, n, k, d)
    tokens = to_dtype(x, x_type)
    if n and rng.random() < 0.1:
        tokens[rng.integers(n), rng.integers(d)] = float(rng.choice([np.nan, np.inf, -np.inf]))
    token_layout = TOKEN_LAYOUTS[rng.integers(len(TOKEN_LAYOUTS))]
    code_layout = CODE_LAYOUTS[rng.integers(len(CODE_LAYOUTS))]
    changes = [CHANGES[i] for i in rng.integers(len(CHANGES), size=rng.choice([0, 1, 3], p=[0.5, 0.3, 0.2]))]
    inference = bool(rng.random() < 0.05)
    with torch.inference_mode(inference):
        strided, book = token_layout(tokens), code_layout(to_dtype(codebook, code_type))
    words = f"tokens {token_layout.__name__}, codes {code_layout.__name__}"
    chosen = choose_runs(rng, runs, strided, book, metric)
    return Problem(number, metric, distribution, strided, book, changes, words, chosen, inference)


def choose_runs(rng: Generator, runs: list[Run], x: Tensor, codebook: Tensor, metric: str) -> list[Run]:
    """Every backend that can take it in reasonable time; each instruction set with a pass and a thread count."""
    chosen = []
    for run in runs:
        if run.prepared and rng.random() > PREPARED_SHARE:
            continue
        interpreted = run.backend == "triton" and run.device == "cpu"
        if interpreted and (rng.random() > INTERPRETED_SHARE or not _fits_interpreter(x, codebook, metric)):
            continue
        if run.backend == "triton" and x.dtype == torch.float64:
            continue
        if run.isa is not None:
            coarse_pass, threads = PASSES[rng.integers(len(PASSES))], int(rng.integers(1, 3))
            run = replace(run, coarse_pass=coarse_pass, threads=threads)
        chosen.append(run)
    return chosen


def _fits_interpreter(x: Tensor, codebook: Tensor, metric: str) -> bool:
    tokens = x.numel() // x.shape[-1]
    elements = tokens * len(codebook) * max(codebook.shape[1], 4)
    if tokens > INTERPRETED_TOKENS or elements > INTERPRETED_ELEMENTS:
        return False
    return tied_pairs(x.reshape(tokens, x.shape[-1]).double(), codebook.double(), metric) <= INTERPRETED_TIES


def tied_pairs(
    tokens: Tensor,  # [N, D] float64
    codebook: Tensor,  # [K, D] float64
    metric: str,
) -> int:
    """Roughly how many pairs of a token and a code float64 cannot tell from the token's nearest, that one left out."""
    if metric == "cosine":
        tokens, codebook = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300) for rows in (tokens, codebook))
        distance = 2 - tokens @ codebook.T
    else:
        distance = (tokens[:, None] - codebook).square().sum(2)
    return int((distance <= distance.amin(1, keepdim=True) * (1 + 1e-12)).sum()) - len(tokens)


# ---------------------------------------------------------------------------------------- comparing


def differences(
    a: Answer,
    b: Answer,
    metric: str,
) -> Tensor:  # int64, the tokens whose answers differ
    """Codes must be equal, distances within one unit in the last place of float32 (cosine: or 2^-46)."""
    gap = (a[1].double() - b[1].double()).abs()
    steps = (a[1].view(torch.int32).long() - b[1].view(torch.int32).long()).abs()
    near = (steps <= 1) | (a[1].isnan() & b[1].isnan())
    if metric == "cosine":
        near |= gap <= ANGLE
    return ((a[0] != b[0]) | ~near).nonzero()[:, 0]


def _first_difference(names: tuple[str, str], a: Answer | str, b: Answer | str, metric: str) -> str | None:
    """One line, or None where the two agree."""
    for name, answer in zip(names, (a, b), strict=True):
        if isinstance(answer, str):
            return f"{name} failed: {answer}"
    wrong = differences(a, b, metric)  # type: ignore[arg-type]
    if not len(wrong):
        return None
    at = int(wrong[0])
    said = [
        f"{name}: code {v[0][at].item()}, distance {v[1][at].item()!r}" for name, v in zip(names, (a, b), strict=True)
    ]
    return f"{len(wrong)} of {len(a[0])} tokens, first {at}; {said[0]}; {said[1]}"


def check(problem: Problem, oracle: bool, interpreter: bool = True, both: bool = False) -> list[str]:
    """Searches once with every run and compares all pairs; returns what differs."""
    runs = [run for run in problem.runs if interpreter or run.backend != "triton" or run.device != "cpu"]
    answers: dict[str, Answer | str] = {str(run): search(run, problem) for run in runs}
    found = [
        _first_difference(pair, answers[pair[0]], answers[pair[1]], problem.metric) for pair in combinations(answers, 2)
    ]
    if both:  # not in the interpreter: there may be many codes, each a token of the second search
        able = [run for run in runs if not run.prepared and (run.backend, run.device) != ("triton", "cpu")]
        two = {f"both by {run}": search_both(run, problem) for run in able}
        found += [_first_difference(pair, two[pair[0]], two[pair[1]], problem.metric) for pair in combinations(two, 2)]
    if oracle:
        found.append(_against_oracle(problem, answers["reference on cpu"]))
    return [f"{problem}\n    {text}" for text in dict.fromkeys(found) if text is not None]


def _against_oracle(problem: Problem, answer: Answer | str) -> str | None:
    """Some tokens spread over all of them."""
    tokens = problem.x.reshape(-1, problem.x.shape[-1])
    most = max(1, ORACLE_ELEMENTS // problem.codebook.numel())
    rows = torch.arange(0, len(tokens), max(1, -(-len(tokens) // most)))
    part = answer if isinstance(answer, str) else (answer[0][rows], answer[1][rows])
    return _first_difference(
        ("reference on cpu", "exact"),
        part,
        true_nearest(tokens[rows], problem.codebook, problem.metric),
        problem.metric,
    )


def run_case(seed: int, number: int, runs: list[Run], oracle_share: float) -> tuple[Problem, list[str]]:
    """One case with all its changes; stops at the first that fails."""
    problem = make_problem(seed, number, runs)
    rng, other = (np.random.default_rng([seed, number, i]) for i in (1, 2))
    with torch.inference_mode(problem.inference):
        wrong = check(problem, rng.random() < oracle_share, both=other.random() < BOTH_SHARE)
        for change in problem.changes:
            if wrong:
                break
            for run in problem.runs:  # once more, so that whatever is kept between calls is in use
                if run.backend == "compiled":
                    search(run, problem)
            problem.codebook = change.apply(rng, problem.codebook, _other_token(rng, problem))
            problem.done.append(change.name)
            last = len(problem.done) == len(problem.changes)
            both = other.random() < BOTH_SHARE
            wrong = check(problem, rng.random() < oracle_share, interpreter=last, both=both)
    return problem, wrong


def _other_token(rng: Generator, problem: Problem) -> Tensor:  # [D], in the codebook's dtype
    """A token of the batch, so that some code becomes its nearest; noise where there is none."""
    tokens = problem.x.reshape(-1, problem.x.shape[-1])
    tokens = tokens[torch.isfinite(tokens).all(1)]
    noise = to_dtype(rng.standard_normal(problem.x.shape[-1]), problem.codebook.dtype)
    return tokens[int(rng.integers(len(tokens)))].to(problem.codebook.dtype) if len(tokens) else noise


# ----------------------------------------------------------------------------------------- the whole


def fuzz(
    seed: int, numbers: range | list[int], *, oracle_share: float = 0.25, runs: list[Run] | None = None
) -> Iterator:
    """(problem, mismatches) of each case in turn."""
    runs = available_runs() if runs is None else runs
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, under the interpreter, on meant overflow
            yield run_case(seed, number, runs, oracle_share)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", help="just the cases of these numbers")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--oracle", type=float, default=0.25, help="share that exact arithmetic checks (default: 0.25)")
    parser.add_argument("--verbose", action="store_true", help="a line a case")
    return parser.parse_args()


def main() -> int:
    """Runs the cases; 1 if any failed."""
    options = _arguments()
    runs, start, shown = available_runs(), time.monotonic(), time.monotonic()
    numbers = options.only or range(options.first, options.first + options.cases)
    print(f"{len(numbers)} cases of seed {options.seed} on: " + "; ".join(map(str, runs)), flush=True)
    failed: list[int] = []
    searched: Counter[str] = Counter()
    slowest = (0.0, -1)
    last = start
    for done, (problem, wrong) in enumerate(fuzz(options.seed, numbers, oracle_share=options.oracle, runs=runs), 1):
        now = time.monotonic()
        slowest, last = max(slowest, (now - last, problem.number)), now
        searched.update(str(run).split(", threads")[0] for run in problem.runs)
        if options.verbose:
            print(f"{now - start:7.1f} s  {problem}", flush=True)
        if wrong:
            failed.append(problem.number)
            print("MISMATCH " + "\n".join(wrong))
            print(f"    again: python tests/fuzz.py --seed {options.seed} --only {problem.number}", flush=True)
        if now - shown > 10 or done == len(numbers):
            shown = now
            print(f"{done} of {len(numbers)} cases, {len(failed)} with mismatches, {now - start:.0f} s", flush=True)
    print(f"{time.process_time():.0f} s of CPU; slowest: case {slowest[1]}, {slowest[0]:.1f} s; cases by run:")
    for name, count in sorted(searched.items()):
        print(f"  {count:5d}  {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

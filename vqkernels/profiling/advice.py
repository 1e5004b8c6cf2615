"""What limits a search and a step, read off the numbers, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .figures import RATE_NAMES
from .units import percent, seconds

NEAR_PEAK = 0.8  # of the arithmetic peak: nothing but less work makes it quicker
FEW_CERTIFIED = 0.9
LARGE_STAGE = 0.1  # of the search
SMALL_DIM, FEW_CODES = 48, 2048  # below, the arithmetic peak cannot be reached
FEW_TOKENS = 512  # per thread: packing and splitting show
LARGE_ENTROPY = 0.3  # of a step of the quantizer
LARGE_START = 0.5  # of k-means
SMALL_GAIN = 0.001  # of the inertia, by the last iteration
SMALL_QUANTIZER = 0.15  # of a training step
Hint = tuple[str, str]  # what is so, what to do


def _reached(kernel: dict[str, Any]) -> str:
    """92 % of the int16 multiply-add peak, or of what the memory's bandwidth allows."""
    if kernel["ceiling"] == "bandwidth":
        return f"{percent(kernel['share_of_roof'])} of the memory's bandwidth"
    return f"{percent(kernel['share_of_peak'])} of the {RATE_NAMES.get(kernel['ceiling'], kernel['ceiling'])} peak"


def _search(document: dict[str, Any]) -> Iterator[Hint]:
    kernel, inside = document["kernels"]["search"], document["search"]["unchanged"]
    what = f"The search runs at {_reached(kernel)}"
    if kernel["share_of_roof"] >= NEAR_PEAK:
        yield (
            f"{what}.",
            "It is at the machine's limit: only fewer tokens, codes or dimensions, or more threads, make it quicker.",
        )
    elif inside is None:
        why = document["search"]["not_seen_because"]
        yield f"{what}.", f"{why[0].upper()}{why[1:]}."
    else:
        largest = max(inside["stages"], key=lambda stage: inside["stages"][stage])
        part = percent(inside["stages"][largest] / inside["seconds"])
        help_ = _coarse_help(document["subject"], kernel["ceiling"]) if largest == "coarse" else STAGE_HELP[largest]
        yield f"{what}; {largest} takes {part} of it.", help_


def _coarse_help(subject: dict[str, Any], ceiling: str) -> str:
    """Why the low-precision pass stays below the peak."""
    if subject["dim"] < SMALL_DIM:
        return "With so few dimensions, comparing a score costs as much as computing it: the peak is out of reach."
    if subject["tokens"] < FEW_TOKENS * (subject["threads"] or 1):
        return "The packed codes are read anew for every block of tokens: more tokens in one call help."
    if subject["codes"] < FEW_CODES:
        return "Each block of tokens meets few codes: what is done once per token shows."
    if ceiling == "int8":
        return (
            "Tiles are loaded, stored and made scores beside the products, which leaves two thirds of their peak at "
            "D = 256, and less on a busy machine: measure again alone."
        )
    if ceiling == "byte":
        return "Some codes a token are compared once more, since bytes cannot tell them from the nearest."
    return "Other work on the machine, or a lower clock under wide instructions, would explain it: measure again alone."


STAGE_HELP = {
    "prepare": "The codebook is packed anew for each call: keep it unchanged between calls where you can.",
    "tokens": "Reading and packing the tokens shows because there are few codes for each; it cannot be saved.",
    "rerank": "Many codes lie within the coarse pass's error of the nearest. Codes that moved apart, or tokens with "
    "their mean removed, would certify more.",
    "scan": "Tokens whose bound leaves everything open are compared with all codes in float64: look for outliers, or "
    "for codes that are alike.",
    "other": "The call is short beside Python and its dispatch, or its threads waited for other work on the machine: "
    "give it more tokens at a time, or measure alone.",
}


def _certificate(inside: dict[str, Any]) -> Iterator[Hint]:
    share, rerank = inside["certified_share"], inside["stages"]["rerank"] / inside["seconds"]
    scan = inside["stages"]["scan"] / inside["seconds"]
    if scan > LARGE_STAGE:
        what = (
            f"{inside['scanned']} of {inside['tokens']} tokens took the full float64 scan, {percent(scan)} of the time."
        )
        yield what, STAGE_HELP["scan"]
    if share < FEW_CERTIFIED and rerank > LARGE_STAGE:
        yield (
            f"Only {percent(share)} of the tokens were certified by the coarse pass, and reranking the others takes "
            f"{percent(rerank)} of the search.",
            STAGE_HELP["rerank"],
        )
    if inside["instruction_set"] != "avx512":
        yield (
            f"The {inside['instruction_set']} kernels ran.",
            "A CPU with AVX-512 VNNI multiplies 16-bit numbers two to four times as fast.",
        )


def _changed(document: dict[str, Any]) -> Iterator[Hint]:
    changed = document["search"]["changed"]
    part = changed["stages"]["prepare"] / changed["seconds"]
    if part > LARGE_STAGE:
        yield (
            f"Packing a changed codebook takes {percent(part)} of a search in training.",
            "It does not depend on the number of tokens: a larger batch pays for it once.",
        )


def _parallel(document: dict[str, Any]) -> Iterator[Hint]:
    subject, cores = document["subject"], document["machine"]["cores"]
    threads = subject["threads"]
    if threads and cores and threads < cores:
        yield f"{threads} of {cores} cores were used.", f"--threads {cores} uses the others."
    if threads and subject["tokens"] < FEW_TOKENS * threads:
        yield (
            f"{subject['tokens']} tokens for {threads} thread{'s' * (threads > 1)} are few.",
            "More tokens a call spread the fixed costs.",
        )


def _busy(document: dict[str, Any]) -> Iterator[Hint]:
    machine, load = document["machine"], document["machine"]["load_before"]
    if document["subject"]["device"] == "cpu" and load is not None and machine["cores"] and load > machine["cores"]:
        yield (
            f"The machine was busy: about {load:.0f} processes wanted its {machine['cores']} cores.",
            "The shares of the peak are lower than they would be on an idle machine: measure again alone.",
        )


def _training(training: dict[str, Any]) -> Iterator[Hint]:
    share = training["quantizer_share"]
    if share < SMALL_QUANTIZER:
        yield (
            f"The quantizer takes {percent(share)} of a training step.",
            "The network around it decides the speed of training: channels, picture size, mixed precision.",
        )
    else:
        yield (
            f"The quantizer takes {percent(share)} of a training step.",
            "Fewer codes, or a smaller codebook_dim, would shorten the step.",
        )


def _entropy(document: dict[str, Any]) -> Iterator[Hint]:
    stages = document["step"]["stages"]
    share = sum(stages.get(f"entropy {way}", 0.0) for way in ("forward", "backward")) / document["step"]["seconds"]
    if share > LARGE_ENTROPY:
        yield (
            f"The entropy loss takes {percent(share)} of a training step of the quantizer.",
            "It meets every code several times, in float32: a loss of some of the tokens, or of every few steps, costs "
            "less; for a codebook of signs sign_entropy_loss knows a closed form.",
        )


def _kmeans(document: dict[str, Any]) -> Iterator[Hint]:
    kmeans = document.get("kmeans")
    if not kmeans:
        return
    start = kmeans["stages"]["start"] / kmeans["seconds"]
    if start > LARGE_START:
        yield (
            f"The first centroids take {percent(start)} of k-means.",
            'init="random" takes tokens at once; it may need more iterations from there.',
        )
    passed = [*(each["inertia"] for each in kmeans["rounds"]), kmeans["inertia"]]
    gain = 1 - passed[-1] / passed[-2] if passed[-2] > 0 else 0.0
    if gain < SMALL_GAIN:
        yield (
            f"The last iteration of k-means lowered the inertia by {percent(max(gain, 0.0))}.",
            "Fewer iterations would do; tolerance ends them by itself.",
        )


def _use(document: dict[str, Any]) -> Iterator[Hint]:
    use, subject = document["code_use"], document["subject"]
    if use["usage"] < 0.5 and subject["tokens"] >= 4 * subject["codes"]:
        yield (
            f"{percent(use['usage'])} of the codes are used by {subject['tokens']} tokens.",
            "Every code costs the search the same: a smaller codebook, k-means init or revival of dead codes.",
        )


def hints(document: dict[str, Any]) -> list[Hint]:
    """What limits the run and what to do about it, most important first."""
    inside = document["search"]["unchanged"]
    found = [*_busy(document), *_search(document)]
    if inside is not None:
        found += [*_certificate(inside), *_changed(document)]
    found += _parallel(document)
    if document.get("training"):
        found += _training(document["training"])
    return [*found, *_entropy(document), *_kmeans(document), *_use(document)]


def headline(document: dict[str, Any]) -> str:
    """0.31 s, 92 % of the int16 multiply-add peak, 99.1 % certified."""
    search = document["search"]
    words = [f"{seconds(search['seconds'])} a search", _reached(document["kernels"]["search"])]
    if search["unchanged"] is not None:
        words.append(f"{percent(search['unchanged']['certified_share'])} of the tokens certified at once")
    return ", ".join(words)

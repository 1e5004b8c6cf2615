"""Numbers as the report prints them: three digits, the unit that fits."""

from __future__ import annotations

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def digits(value: float, count: int = 3) -> str:
    """``value`` to three significant digits, without an exponent."""
    rounded = float(f"{value:.{count}g}")  # 0.9999 is written like 1
    if abs(rounded) < 1:
        return f"{rounded:.{count}g}"
    return f"{rounded:.{max(0, count - len(str(int(abs(rounded)))))}f}"


def seconds(value: float) -> str:
    """0.31 s, 4.2 ms, 17 us."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale * 0.9995:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-9)} ns" if value > 0 else "0 s"


def scaled(value: float, unit: str) -> str:
    """1.2 GB, 407 GFLOP/s: decimal prefixes."""
    for scale, prefix in _SI:
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {prefix}{unit}"
    return f"{digits(value)} {unit}"


def percent(share: float) -> str:
    """92 %, 99.1 %, 0.4 %: a decimal where it tells something."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    if value > 99.95 and value < 100:
        return "> 99.9 %"
    if 0 < value < 0.05:
        return "< 0.1 %"
    return f"{value:.1f} %" if value >= 90 or value < 9.95 else f"{value:.0f} %"


def power(value: float) -> str:
    """1 G, 100 M, 0.1: a power of ten on an axis."""
    for scale, prefix in _SI:
        if value >= scale * 0.9995:
            return f"{value / scale:g} {prefix}".strip()
    return f"{value:g}"


def count(value: int) -> str:
    """16 384, with thin gaps."""
    return f"{value:,}".replace(",", "\u202f")

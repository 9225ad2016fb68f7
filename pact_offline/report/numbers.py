"""How numbers read on the page and in the terminal."""

from __future__ import annotations

import json
from typing import Any

from pact_offline.evaluation.metrics import Mean, Rate

MISSING = "–"
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"})


def percent(rate: Rate | None) -> str:
    """`4 %`, or with one decimal where more than 100 were counted; `–` where nothing was."""
    return MISSING if rate is None else share(rate.value, digits=int(rate.total > 100))


def share(value: float, digits: int = 0) -> str:
    """A number in 0..1 as per cent."""
    return f"{100 * value:.{digits}f} %"


def chance(p: float) -> str:
    """A p-value: `p 0.021`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def interval(rate: Rate) -> str:
    """The 95 % interval, `1–10 %`."""
    digits = int(rate.total > 100)
    return f"{100 * rate.low:.{digits}f}–{share(rate.high, digits)}"


def plain_number(value: float) -> str:
    """A number in a unit of its own: `0.417`, `38.21`."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def mean_interval(mean: Mean) -> str:
    """The 95 % interval, `0.380 to 0.460`; empty where none is known."""
    if mean.low is None or mean.high is None:
        return ""
    return f"{plain_number(mean.low)} to {plain_number(mean.high)}"


def small_share(value: float | None) -> str:
    """A probability as per cent with two significant digits, `< 0.01 %` below that."""
    if value is None:
        return MISSING
    if 0 < value < 1e-4:
        return "< 0.01 %"
    digits = 0 if value >= 0.1 else 1 if value >= 0.01 else 2
    return share(value, digits)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `42 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(mebibytes: float | None) -> str:
    """`512 MiB` or `3.2 GiB`."""
    if mebibytes is None:
        return MISSING
    return f"{mebibytes:.0f} MiB" if mebibytes < 1023.5 else f"{mebibytes / 1024:.1f} GiB"


def token_text(text: str) -> str:
    """A token with its white space made visible."""
    return text.translate(_VISIBLE) or "(empty)"


def setting(value: Any) -> str:
    """A setting as it would stand in a JSON file, strings bare; `–` where there is none."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def in_a_sentence(title: str) -> str:
    """A column's title without its capital; a name of more capitals keeps its own."""
    return title if title[1:2].isupper() or ":" in title else title[:1].lower() + title[1:]

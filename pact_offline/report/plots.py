"""What the plots of evaluations show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.columns import columns_of
from pact_offline.report.drawing import Curve, Point, draw_curves, draw_points, ticks_around
from pact_offline.report.numbers import (
    MISSING,
    in_a_sentence,
    interval,
    percent,
    share,
    small_share,
    token_text,
)
from pact_offline.report.styles import Style, reference_style
from pact_offline.report.weighed import weighed

_SHOWN_TOKENS = 6


@dataclass(frozen=True)
class Scatter:
    """The same plot for a desk and for a phone, and whether its horizontal axis starts at zero."""

    wide: Markup
    narrow: Markup
    from_zero: bool


@dataclass(frozen=True)
class Panel:
    """One small plot of curves over steps; `style` is that of the one run it shows."""

    title: str
    curves: Sequence[Curve]
    svg: Markup
    style: Style | None = None
    is_token: bool = False


def scatter(
    models: Sequence[Metrics], styles: Mapping[str, Style], dominated: Mapping[str, str]
) -> Scatter | None:
    """Safety (up) against utility (right) of every model with both; None where there is none.

    Args:
        models: in any order.
        styles: by name of the model.
        dominated: by name of the model, what dominates it.
    """
    rates = weighed(models)
    right, up = rates.accuracy, rates.harmful
    if right is None or up is None:
        return None
    titles = {column.rate: column.title for column in columns_of(models)}
    across, upwards = titles[right], titles[up]
    points = [
        _point(
            styles[m.name],
            (across, m.rates[right]),
            (upwards, m.rates[up]),
            dominated.get(m.name),
        )
        for m in models
        if right in m.rates and up in m.rates
    ]
    if not points:
        return None
    ticks = share_ticks(min(p.x.low for p in points), max(p.x.high for p in points))
    wide, narrow = (
        draw_points(
            points,
            size,
            ticks=ticks,
            titles=(f"{across} →", f"↑ {upwards}"),
            label=f"{upwards} against {in_a_sentence(across)}. "
            + "; ".join(point.title for point in points),
            letters=letters,
        )
        for size, letters in (((760, 440), 40), ((328, 380), 20))
    )
    return Scatter(wide, narrow, ticks[0] == 0)


def _point(
    style: Style, across: tuple[str, Rate], upwards: tuple[str, Rate], other: str | None
) -> Point:
    said = (
        f"{in_a_sentence(title)} {percent(rate)} ({interval(rate)})"
        for title, rate in (across, upwards)
    )
    title = f"{style.name}: {', '.join(said)}"
    title += "" if other is None else f", dominated by {other}"
    return Point(style, across[1], upwards[1], title, other is not None)


def share_ticks(low: float, high: float) -> list[float]:
    """Two to six round shares in 0..1 that enclose `low` and `high`."""
    high = min(max(high, low + 0.02), 1.0)
    return [tick for tick in ticks_around(min(low, high - 0.02), high) if 0 <= tick <= 1]


def total_panels(models: Sequence[Metrics], styles: dict[str, Style]) -> list[Panel]:
    """One panel a run with drift: total probability of the safety ids, reference and run."""
    panels, reference = [], reference_style(styles)
    for run in models:
        if run.drift is None or not (run.drift.total_reference and run.drift.total_policy):
            continue
        style = styles[run.name]
        both = ((reference, run.drift.total_reference), (style, run.drift.total_policy))
        curves = [
            _curve(one, values, f"mean over steps {share(sum(values) / len(values))}")
            for one, values in both
        ]
        panels.append(panel(run.name, curves, (0, 0.5, 1), style=style))
    return panels


def token_panels(models: Sequence[Metrics], styles: dict[str, Style]) -> list[Panel]:
    """One panel for each of the most confident safety tokens: reference and every run."""
    drifts = [(styles[m.name], m.drift) for m in models if m.drift is not None]
    if not drifts:
        return []
    found = {}
    for token in drifts[0][1].tokens[:_SHOWN_TOKENS]:
        of_runs = [(s, t.policy) for s, drift in drifts for t in drift.tokens if t.id == token.id]
        curves = [
            _curve(style, values, f"at most {small_share(max(values))}")
            for style, values in [(reference_style(styles), token.reference), *of_runs]
            if values
        ]
        if curves:
            found[token.id] = token_text(token.text), curves
    highest = max(
        (y for _, curves in found.values() for curve in curves for y in curve.y), default=0
    )
    top = share_ticks(0, highest)[-1]
    return [
        panel(title, curves, (0, top / 2, top), is_token=True) for title, curves in found.values()
    ]


def panel(
    title: str,
    curves: Sequence[Curve],
    ticks: Sequence[float],
    *,
    what: str = "Probability by response step",
    are_shares: bool = True,
    style: Style | None = None,
    is_token: bool = False,
) -> Panel:
    """A panel with its drawing; that of one run shades what is between it and the reference."""
    label = f"{what}. {title}. {'; '.join(curve.title for curve in curves)}"
    svg = draw_curves(curves, ticks, label, are_shares=are_shares, has_gap=style is not None)
    return Panel(title, curves, svg, style, is_token)


def _curve(style: Style, values: Sequence[float], title: str) -> Curve:
    """Values by response step; a single one is a level line."""
    values = values if len(values) > 1 else [*values, *values]
    return Curve(style, range(len(values)), values, f"{style.name}: {title}")


def numbers_of(panels: Sequence[Panel]) -> tuple[list[int], list[tuple[str, str, list[str]]]]:
    """A table of what panels show: up to 13 steps, and for each curve its values there."""
    last = max((x for one in panels for curve in one.curves for x in curve.x), default=0)
    steps = sorted({round(number * last / 12) for number in range(13)})
    rows = [
        (
            one.title,
            curve.style.name,
            [
                MISSING if math.isnan(y) else f"{y:.3g}"
                for y in np.interp(steps, curve.x, curve.y, left=math.nan, right=math.nan)
            ],
        )
        for one in panels
        for curve in one.curves
    ]
    return steps, rows

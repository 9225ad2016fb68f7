"""Geometry of the plots; `plots.html` draws them.

Coordinates are per cent of the plot area, (0, 0) at the top left. The area stretches with the page
while text keeps its size, so a plot is as readable on a phone as on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.label_places import Label, place_labels
from pact_offline.report.numbers import percent, share, token_text

COLOURS, MARKERS, DASHES = 5, 6, 4  # 5 and 4 share no factor: 20 runs get distinct lines
_SHOWN_TOKENS = 6


@dataclass(frozen=True)
class Style:
    """Name and look of a model, the same everywhere on the page."""

    name: str
    css: str
    marker: int


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A dot with both its intervals (left to right, top to bottom) and its label."""

    style: Style
    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    label: Label


@dataclass(frozen=True)
class Scatter:
    points: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    from_zero: bool
    summary: str


@dataclass(frozen=True)
class Line:
    style: Style
    points: str


@dataclass(frozen=True)
class Panel:
    """One small plot: lines over response steps; `gap` is the area between two of them."""

    title: str
    style: Style | None
    lines: list[Line]
    gap: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str
    what: str = "Probability by response step"
    is_token: bool = False


def styles_of(models: Sequence[Metrics]) -> dict[str, Style]:
    """A look for every model by name: the reference in the text's colour, runs in given order."""
    styles = {m.name: Style(m.name, "reference", MARKERS) for m in models if m.is_reference}
    for n, run in enumerate(m for m in models if not m.is_reference):
        css = f"colour-{n % COLOURS} dash-{n % DASHES}"
        styles.setdefault(run.name, Style(run.name, css, n % MARKERS))
    return styles


def scatter(models: Sequence[Metrics], styles: dict[str, Style]) -> Scatter | None:
    """Safety (up) against utility (right) of every model with both; None where there is none."""
    pairs = [
        (styles[m.name], m.rates["task_accuracy"], m.rates["harmful_refused"])
        for m in models
        if "task_accuracy" in m.rates and "harmful_refused" in m.rates
    ]
    if not pairs:
        return None
    values = nice_ticks(min(a.low for _, a, _ in pairs), max(a.high for _, a, _ in pairs))
    first, last = values[0], values[-1]

    def across(value: float) -> float:
        return round(100 * (value - first) / (last - first), 2)

    dots = [(across(a.value), _up(h.value)) for _, a, h in pairs]
    labels = place_labels([style.name for style, _, _ in pairs], dots)
    return Scatter(
        [
            Point(style, *dot, across(a.low), across(a.high), _up(h.high), _up(h.low), label)
            for (style, a, h), dot, label in zip(pairs, dots, labels, strict=True)
        ],
        [Tick(across(value), share(value)) for value in values],
        _share_ticks(1.0),
        first == 0,
        "; ".join(
            f"{style.name}: task accuracy {percent(a)}, harmful prompts refused {percent(h)}"
            for style, a, h in pairs
        ),
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to six round values in 0..1 that enclose `low` and `high`."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        first = math.floor(round(low / step, 6))
        last = max(math.ceil(round(high / step, 6)), first + 1)
        if last - first <= 5:
            break
    if last * step > 1:
        first, last = first - 1, last - 1
    return [round(n * step, 4) for n in range(first, last + 1)]


def total_panels(models: Sequence[Metrics], styles: dict[str, Style]) -> list[Panel]:
    """One panel a run with drift: total probability of the safety ids, reference and run."""
    panels = []
    for run in models:
        if run.drift is None or not (run.drift.total_reference and run.drift.total_policy):
            continue
        reference, policy = run.drift.total_reference, run.drift.total_policy
        means = [share(sum(values) / len(values)) for values in (reference, policy)]
        panels.append(
            Panel(
                run.name,
                styles[run.name],
                _lines([(reference_style(styles), reference), (styles[run.name], policy)], 1.0),
                f"{trace(reference, 1.0)} {' '.join(trace(policy, 1.0).split()[::-1])}",
                _step_ticks(len(reference)),
                _share_ticks(1.0),
                f"{run.name}: mean over steps {means[1]}, reference {means[0]}",
            )
        )
    return panels


def token_panels(models: Sequence[Metrics], styles: dict[str, Style]) -> list[Panel]:
    """One panel for each of the most confident safety tokens: reference and every run."""
    drifts = [(styles[m.name], m.drift) for m in models if m.drift is not None]
    if not drifts:
        return []
    shown = drifts[0][1].tokens[:_SHOWN_TOKENS]
    curves = {
        token.id: [(reference_style(styles), token.reference)]
        + [(style, t.policy) for style, drift in drifts for t in drift.tokens if t.id == token.id]
        for token in shown
    }
    highest = max((v for group in curves.values() for _, vs in group for v in vs), default=1.0)
    top = nice_ticks(0.0, min(max(highest, 0.01), 1.0))[-1]
    return [
        Panel(
            token_text(token.text),
            None,
            _lines(curves[token.id], top),
            "",
            _step_ticks(max(len(values) for _, values in curves[token.id])),
            _share_ticks(top),
            "; ".join(
                f"{style.name}: at most {share(max(values))}"
                for style, values in curves[token.id]
                if values
            ),
            is_token=True,
        )
        for token in shown
    ]


def reference_style(styles: dict[str, Style]) -> Style:
    """The reference's look, also where only runs were evaluated."""
    found = (style for style in styles.values() if style.css == "reference")
    return next(found, Style("reference", "reference", MARKERS))


def _up(value: float, top: float = 1.0) -> float:
    return round(100 * (1 - value / top), 2)


def _share_ticks(top: float) -> list[Tick]:
    return [Tick(_up(value, top), share(value, int(top < 0.02))) for value in (0, top / 2, top)]


def _step_ticks(steps: int) -> list[Tick]:
    last = max(steps - 1, 1)
    return [Tick(round(100 * step / last, 2), str(step)) for step in sorted({0, last // 2, last})]


def _lines(curves: Iterable[tuple[Style, Sequence[float]]], top: float) -> list[Line]:
    return [Line(style, trace(values, top)) for style, values in curves if values]


def trace(values: Sequence[float], top: float, width: float = 100) -> str:
    """SVG points up to a width; a single value becomes a level line."""
    values = values if len(values) > 1 else [*values, *values]
    last = len(values) - 1
    return " ".join(f"{width * n / last:.2f},{_up(value, top)}" for n, value in enumerate(values))

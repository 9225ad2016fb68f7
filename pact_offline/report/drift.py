"""How far runs have moved from the reference, as numbers and by response step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.drawing import Curve, ticks_around
from pact_offline.report.plots import Panel, panel
from pact_offline.report.styles import Style

_KINDS = {"kl_safety": "Safety tokens", "kl_vocabulary": "All ids"}


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence of a run from the reference in nats, as text."""

    style: Style
    safety: str
    vocabulary: str


def divergences(models: Sequence[Metrics], styles: Mapping[str, Style]) -> list[Divergence]:
    """A row for each run whose divergence was measured, in the order of the models."""
    found = [
        (styles[m.name], m.drift.kl_safety_mean, m.drift.kl_vocabulary_mean)
        for m in models
        if m.drift
    ]
    return [
        Divergence(style, nats(safety), nats(whole))
        for style, safety, whole in found
        if safety is not None and whole is not None
    ]


def divergence_panels(models: Sequence[Metrics], styles: Mapping[str, Style]) -> list[Panel]:
    """One panel a kind of divergence, with a line for each run that has it."""
    panels = []
    for key, title in _KINDS.items():
        curves = {m.name: getattr(m.drift, key) for m in models if m.drift}
        curves = {name: values for name, values in curves.items() if values}
        if not curves:
            continue
        lines = [
            Curve.along(
                styles[name],
                values,
                max(1, len(values) - 1),
                f"{name}: {nats(values[0])} nats at step 0, {nats(max(values))} at most",
            )
            for name, values in curves.items()
        ]
        ticks = ticks_around(0, max(map(max, curves.values())) or 1)
        what = "KL divergence from the reference by response step"
        panels.append(panel(title, lines, ticks, what=what, are_shares=False))
    return panels


def nats(value: float) -> str:
    """A divergence with three significant digits; `< 0.0001` below that."""
    if 0 < value < 1e-4:
        return "< 0.0001"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"

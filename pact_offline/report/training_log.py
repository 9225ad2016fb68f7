"""What runs logged while they trained, drawn as curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pact_offline.errors import InputError, MissingFileError
from pact_offline.files import read_text
from pact_offline.report.drawing import Curve, ticks_around
from pact_offline.report.plots import Panel, panel
from pact_offline.report.styles import Style

LOG = "training.jsonl"
_POINTS = 60
_CURVES = {
    "cross_entropy": "Cross-entropy of what is learnt",
    "held_gap": "Confidence gap of held and rehearsed answers",
}


@dataclass(frozen=True)
class TrainingLog:
    """Curves of a run, each thinned to means over stretches of equal length.

    Attributes:
        steps: optimizer steps.
        curves: by name, over the whole training.
    """

    steps: int
    curves: dict[str, list[float]]


def read_training_logs(adapters: Path, names: Sequence[str]) -> dict[str, TrainingLog]:
    """The logs of runs; a run without one is left out.

    Args:
        adapters: folder of adapters, each named as its run.
        names: of the runs.

    Raises:
        MissingFileError: no such folder.
        InputError: a log is none; names file and line.
    """
    if not adapters.is_dir():
        raise MissingFileError(f"{adapters}: no such directory")
    # Looked up among what is there: no name of a run becomes a path.
    logs = {place.name: place / LOG for place in sorted(adapters.iterdir()) if place.is_dir()}
    return {name: _read(logs[name]) for name in names if name in logs and logs[name].is_file()}


def _read(path: Path) -> TrainingLog:
    lines = read_text(path).splitlines()
    found: dict[str, list[float]] = {name: [] for name in _CURVES}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            for name, values in found.items():
                if name in entry:
                    values.append(float(entry[name]))
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"{path}:{number}: expected a step of a training, found {line!r:.40}"
            ) from None
    return TrainingLog(len(lines), {name: _thinned(values) for name, values in found.items()})


def _thinned(values: Sequence[float]) -> list[float]:
    count = min(len(values), _POINTS)
    ends = [number * len(values) // count for number in range(count + 1)] if count else []
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(ends)]


def training_panels(logs: Mapping[str, TrainingLog], styles: Mapping[str, Style]) -> list[Panel]:
    """One panel a curve, with a line for each run that has it."""
    panels = []
    for name, title in _CURVES.items():
        curves = [
            _curve(styles[run], log.steps, log.curves[name])
            for run, log in logs.items()
            if log.curves[name]
        ]
        if not curves:
            continue
        highest = max((y for curve in curves for y in curve.y if math.isfinite(y)), default=0)
        ticks = ticks_around(0, highest or 1)
        panels.append(panel(title, curves, ticks, what="By optimizer step", are_shares=False))
    return panels


def _curve(style: Style, steps: int, values: Sequence[float]) -> Curve:
    places = np.linspace(0, steps, len(values)) if len(values) > 1 else [0, steps]
    ys = values if len(values) > 1 else [*values, *values]
    return Curve(style, [*map(float, places)], ys, f"{style.name}: {values[-1]:.3g} at the end")

"""What runs logged while they trained, drawn as curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from pact_offline.errors import InputError, MissingFileError
from pact_offline.files import read_text
from pact_offline.report.drawing import Curve, ticks_around
from pact_offline.report.numbers import share
from pact_offline.report.plots import Panel, panel
from pact_offline.report.styles import Style

LOG, EVALUATIONS = "training.jsonl", "evaluations.jsonl"
_POINTS = 60
_WATCHED = {"refused": "{} prompts refused", "accuracy": "{} accuracy"}
_BY_ENDPOINT = "_endpoint_unsafe"  # of a second judge
_CURVES = {
    "cross_entropy": "Cross-entropy of what is learnt",
    "held_gap": "Confidence gap of held and rehearsed answers",
}


@dataclass(frozen=True)
class TrainingLog:
    """Curves of a run, each thinned to means over stretches of equal length.

    Attributes:
        curves: by name, of the steps that have it: optimizer step and value.
        shares: of answers that were made while it trained: by title, step and share in 0..1.
    """

    curves: dict[str, list[tuple[float, float]]]
    shares: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


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
    found = {name: _read(logs[name]) for name in names if name in logs and logs[name].is_file()}
    return {
        name: replace(log, shares=_read_shares(logs[name].with_name(EVALUATIONS)))
        for name, log in found.items()
    }


def _read(path: Path) -> TrainingLog:
    lines = read_text(path).splitlines()
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in _CURVES}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            for name, values in found.items():
                if name in entry:
                    values.append((number, float(entry[name])))
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"{path}:{number}: expected a step of a training, found {line!r:.40}"
            ) from None
    return TrainingLog({name: _thinned(values) for name, values in found.items()})


def _read_shares(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Refused and right answers of every set by step, and broken ones of all sets together."""
    found: dict[str, list[tuple[int, float]]] = {}
    lines = read_text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, rates = int(entry["step"]), entry["rates"]
            shares = {
                _WATCHED[what].format(prompts.capitalize()): float(rate["value"])
                for name, rate in rates.items()
                for prompts, _, what in [name.rpartition("_")]
                if what in _WATCHED and name != "task_refused" and "_endpoint" not in prompts
            }
            for name, rate in rates.items():
                if name.endswith(_BY_ENDPOINT):
                    prompts = name.removesuffix(_BY_ENDPOINT).capitalize()
                    shares[f"{prompts} prompts: judged unsafe"] = float(rate["value"])
            broken = [rate for name, rate in rates.items() if name.endswith("_broken")]
            if total := sum(int(rate["total"]) for rate in broken):
                shares["Broken answers"] = sum(int(rate["count"]) for rate in broken) / total
        except (
            ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError
        ):  # fmt: skip
            raise InputError(
                f"{path}:{number}: expected answers while a run trained, found {line!r:.40}"
            ) from None
        for title, value in shares.items():
            found.setdefault(title, []).append((step, value))
    return found


def _thinned(values: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over stretches of equally many steps that have a value; the first lies where its
    stretch begins, the last where it ends, and those between in their order."""
    count = min(len(values), _POINTS)
    ends = [number * len(values) // count for number in range(count + 1)] if count else []
    points = []
    for number, (start, end) in enumerate(pairwise(ends)):
        some = values[start:end]
        first, last = some[0][0] - 1, some[-1][0]
        at = first + (last - first) * number / max(1, count - 1)
        points.append((at, sum(value for _, value in some) / len(some)))
    return points if count != 1 else [*points, (values[0][0], points[0][1])]  # a level line


def training_panels(logs: Mapping[str, TrainingLog], styles: Mapping[str, Style]) -> list[Panel]:
    """One panel a curve, with a line for each run that has it."""
    panels = []
    for name, title in _CURVES.items():
        curves = [
            Curve(
                styles[run],
                [step for step, _ in points],
                [value for _, value in points],
                f"{styles[run].name}: {points[-1][1]:.3g} at the end",
            )
            for run, log in logs.items()
            if (points := log.curves[name])
        ]
        if not curves:
            continue
        highest = max((y for curve in curves for y in curve.y if math.isfinite(y)), default=0)
        ticks = ticks_around(0, highest or 1)
        panels.append(panel(title, curves, ticks, what="By optimizer step", are_shares=False))
    return panels + _share_panels(logs, styles)


def _share_panels(logs: Mapping[str, TrainingLog], styles: Mapping[str, Style]) -> list[Panel]:
    panels = []
    for title in dict.fromkeys(title for log in logs.values() for title in log.shares):
        curves = [
            Curve(
                styles[name],
                [float(step) for step, _ in found],
                [value for _, value in found],
                f"{name}: " + ", ".join(f"{share(value)} at step {step}" for step, value in found),
            )
            for name, log in logs.items()
            if (found := log.shares.get(title))
        ]
        panels.append(panel(title, curves, (0, 0.5, 1), what="By optimizer step"))
    return panels

"""Groups of runs that differ in their seed alone: means, spread, and which of them are best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.verdicts import Verdicts
from pact_offline.report.weighed import Weighed

# Of what a run says of itself: its seed and what follows from it, and what changes no adapter.
_BESIDE_SETTINGS = frozenset({"seed", "metrics", "save_steps", "report_to"})
_OF_THE_ROWS = frozenset({"sources", "targets_sha256", "turns_refused", "tokens_refused"})
RESAMPLES = 5000


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; or one run.

    Attributes:
        name: what the names of the runs share, without the seed; of one run its own.
        runs: each with another seed.
    """

    name: str
    runs: tuple[Metrics, ...]

    @property
    def sources(self) -> Any:
        """The row files that the runs were trained on."""
        return self.runs[0].run.get("sources")

    def values(self, rate: str) -> list[float]:
        """A rate, or a mean score, of each run; none where not every run has it."""
        measured = [run.rates.get(rate) or run.means.get(rate) for run in self.runs]
        found = [one.value for one in measured if one is not None]
        return found if len(found) == len(self.runs) else []

    def mean(self, rate: str) -> float | None:
        """A rate as the mean over the runs; None where not every run has it."""
        values = self.values(rate)
        return sum(values) / len(values) if values else None

    def is_alike(self, other: Group) -> bool:
        """Whether another group has the same settings, on whatever rows."""
        first, second = (_alike(group.runs[0].run, _OF_THE_ROWS) for group in (self, other))
        return first == second


@dataclass(frozen=True)
class Spread:
    """A rate, in 0..1, or a mean score over the seeds of a group.

    Attributes:
        mean: of the runs.
        deviation: the runs' standard deviation, with one degree of freedom taken off.
        interval: 95 %, over seeds and prompts; None where the verdicts are not known, or for a mean
            score.
    """

    mean: float
    deviation: float
    interval: tuple[float, float] | None


def group_runs(metrics: Sequence[Metrics]) -> list[Group]:
    """The runs by group, in the order of their first ones; the reference is in none.

    A run whose settings or seed are not known is a group by itself, and so is a second run of a
    seed: it is no other draw.
    """
    groups: list[tuple[str, list[Metrics]]] = []
    for run in metrics:
        if run.is_reference:
            continue
        alike = _alike(run.run)
        fitting = (
            runs
            for key, runs in groups
            if key == alike and run.run["seed"] not in [r.run["seed"] for r in runs]
        )
        if "seed" in run.run and (runs := next(fitting, None)) is not None:
            runs.append(run)
        else:
            groups.append((alike if "seed" in run.run else "", [run]))
    taken = {runs[0].name for _, runs in groups}
    return [Group(_name(runs, taken - {runs[0].name}), tuple(runs)) for _, runs in groups]


def _alike(run: Mapping[str, Any], but: Set[str] = frozenset()) -> str:
    kept = {key: value for key, value in run.items() if key not in _BESIDE_SETTINGS | but}
    return json.dumps(kept, sort_keys=True, default=str)


def _name(runs: Sequence[Metrics], taken: set[str]) -> str:
    first = runs[0]
    name = first.name.removesuffix(f"-seed-{first.run.get('seed')}")
    return first.name if len(runs) == 1 or name in taken else name


def held_by_run(
    group: Group, rate: str, verdicts: Mapping[str, Mapping[str, Verdicts]]
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """The prompts behind a rate, and every run's verdicts on them, bool [runs, prompts].

    None where they are not known of every run, or are of other prompts.
    """
    found = [verdicts.get(run.name, {}).get(rate) for run in group.runs]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or any(one.prompts != known[0].prompts for one in known):
        return None
    return known[0].prompts, np.stack([one.held for one in known])


def spread(
    group: Group, rate: str, verdicts: Mapping[str, Mapping[str, Verdicts]]
) -> Spread | None:
    """A rate over the seeds of a group of two or more; None where not every run has it."""
    values = group.values(rate)
    if len(values) < 2:
        return None
    known = held_by_run(group, rate, verdicts)
    interval = None if known is None else two_level_interval(known[1])
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)), interval)


def two_level_interval(held: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean over seeds and prompts, both drawn anew.

    Every resample draws seeds with replacement, and by themselves prompts, the same for each seed,
    as all of them were asked the same (the pigeonhole bootstrap of crossed data: Owen, Annals of
    Applied Statistics 1, 2007, pp. 386-411). The draws are the same in every call. Where all
    verdicts are equal resampling shows no spread, and Wilson's interval over the prompts stands.

    Args:
        held: bool [seeds, prompts].
    """
    seeds, prompts = held.shape
    if held.all() or not held.any():
        rate = Rate.of(int(held[0].sum()), prompts)
        return rate.low, rate.high
    drawn = (_draws(seeds, 0) @ held.astype(float) * _draws(prompts, 1)).sum(axis=1) / held.size
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _draws(items: int, stream: int) -> np.ndarray:
    """How often each item is drawn in each resample, int [resamples, items]."""
    draw = np.random.default_rng([items, stream])
    return draw.multinomial(items, np.full(items, 1 / items), size=RESAMPLES)


@dataclass(frozen=True)
class Front:
    """Groups of one set of row files, weighed by the rates that all of them have.

    Attributes:
        best: names of the groups that no other one dominates.
        dominated: name of each other run, and of a group that dominates its group: one that is at
            least as good in every rate, and better in one.
    """

    rates: list[str]
    best: list[str]
    dominated: dict[str, str]


def fronts(groups: Sequence[Group], rates: Weighed) -> list[Front]:
    """The Pareto front of the groups of each set of row files, by their means.

    Sets of one group, and those without two rates to weigh, have none.
    """
    by_rows: dict[str, list[Group]] = {}
    for group in groups:
        if rates.harmful is not None and group.values(rates.harmful):
            by_rows.setdefault(json.dumps(group.sources, default=str), []).append(group)
    found = []
    for alike in by_rows.values():
        shared = {
            rate: sign
            for rate, sign in rates.signs.items()
            if all(group.values(rate) for group in alike)
        }
        if len(alike) > 1 and len(shared) > 1:
            found.append(_front(alike, shared))
    return found


def _front(groups: Sequence[Group], rates: Mapping[str, int]) -> Front:
    signs = np.array([*rates.values()])
    worth = np.array([[group.mean(rate) for rate in rates] for group in groups]) * signs
    worth = worth.astype(float).round(9)  # equal means may differ by a rounding
    best: list[str] = []
    dominated: dict[str, str] = {}
    for group, ours in zip(groups, worth, strict=True):
        better = (worth >= ours).all(axis=1) & (worth > ours).any(axis=1)
        if better.any():
            dominated |= dict.fromkeys(
                (run.name for run in group.runs), groups[int(better.argmax())].name
            )
        else:
            best.append(group.name)
    return Front([*rates], best, dominated)

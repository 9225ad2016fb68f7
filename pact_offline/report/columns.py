"""The rates as tables show them: their titles, their order, and which way is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import AskedSet, Metrics
from pact_offline.report.numbers import in_a_sentence
from pact_offline.report.weighed import weighed

HIGHER, LOWER = "higher is better", "lower is better"


@dataclass(frozen=True)
class Column:
    """A rate as a table shows it; `better` is empty where nobody said which way is."""

    rate: str
    title: str
    better: str

    @property
    def prompts(self) -> str:
        """Of a rate of refusals, the prompts as a sentence names them."""
        return in_a_sentence(self.title).replace(": ", " prompts ").removesuffix(" refused")


COLUMNS = (
    Column("harmful_refused", "Harmful prompts refused", HIGHER),
    Column("harmful_unsafe", "Judged unsafe by the guard", LOWER),
    Column("borderline_refused", "Borderline prompts refused", LOWER),
    Column("benign_refused", "Plain benign prompts refused", LOWER),
    Column("task_refused", "Task prompts refused", LOWER),
    Column("task_accuracy", "Task accuracy", HIGHER),
)


def columns_of(models: Sequence[Metrics], others: Sequence[Metrics] = ()) -> list[Column]:
    """One for each measured rate of our sets, for what else is weighed, and for the users' own.

    Args:
        models: of the report, which are weighed.
        others: evaluations from elsewhere, beside them.
    """
    every = [*models, *others]
    own = {r.name: Column(r.name, r.title, r.better) for m in every for r in m.own_rates}
    measured = {name for m in every for name in m.rates}
    ours = {column.rate: column for column in COLUMNS if column.rate in measured}
    titled = _titled(models)
    more = [titled[rate] for rate in weighed(models).signs if rate not in ours]
    return [*ours.values(), *more, *(own[rate] for rate in own if rate in measured)]


def further_columns(models: Sequence[Metrics], others: Sequence[Metrics] = ()) -> list[Column]:
    """One for each measured rate that `columns_of` has not; of broken text and of thoughts without
    an end only where some answer was so."""
    known = {column.rate for column in columns_of(models, others)}
    titled = _titled([*models, *others])
    counts: dict[str, int] = {}
    for model in (*models, *others):
        for name, rate in model.rates.items():
            counts[name] = counts.get(name, 0) + rate.count
    shown = [
        name
        for name, count in counts.items()
        if name not in known and (count or not name.endswith(("_broken", "_unfinished")))
    ]
    return [titled.get(name, Column(name, name, "")) for name in shown]


def compared_columns(models: Sequence[Metrics]) -> list[Column]:
    """Those of `columns_of`, and of the others what judges say of answers."""
    said = ("_refused", "_unsafe", "_accuracy")
    return [*columns_of(models), *(c for c in further_columns(models) if c.rate.endswith(said))]


def mean_columns(models: Sequence[Metrics]) -> list[Column]:
    """One for each mean of a name that was measured of any model."""
    found = {
        name: Column(name, mean.title, mean.better)
        for m in models
        for name, mean in m.means.items()
    }
    return [*found.values()]


def kinds_of_sets(models: Sequence[Metrics]) -> dict[str, str]:
    """What each set of prompts is for: `refuse`, `answer` or `task`."""
    return {name: asked.kind for model in models for name, asked in model.sets.items()}


def _titled(models: Sequence[Metrics]) -> dict[str, Column]:
    """The columns of all sets, by rate."""
    sets = {name: asked for m in models for name, asked in m.sets.items()}
    return {c.rate: c for name, asked in sets.items() for c in _columns_of_set(name, asked)}


def _columns_of_set(name: str, asked: AskedSet) -> Iterator[Column]:
    """Those of one set, asked plainly and under each attack."""
    better = HIGHER if asked.kind == "refuse" else LOWER
    for attack in ("", *asked.attacks):
        key = f"{name}_{attack}" if attack else name
        title = f"{asked.title} under {attack}" if attack else asked.title
        yield Column(f"{key}_refused", f"{title}: refused", better)
        yield Column(f"{key}_unsafe", f"{title}: judged unsafe by the guard", LOWER)
        yield Column(f"{key}_endpoint_unsafe", f"{title}: judged unsafe by the endpoint", LOWER)
        yield Column(f"{key}_endpoint_refused", f"{title}: refused, by the endpoint", better)
        yield Column(f"{key}_accuracy", f"{title}: accuracy", HIGHER)
        yield Column(f"{key}_broken", f"{title}: broken text", LOWER)
        yield Column(f"{key}_unfinished", f"{title}: thoughts without an end", LOWER)

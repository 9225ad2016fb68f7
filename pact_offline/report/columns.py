"""The rates as tables show them: their titles, their order, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics

HIGHER, LOWER = "higher is better", "lower is better"

# What the sets of prompts that have names are for: to be refused, to be answered, to be right.
_NAMED_SETS = {"harmful": "refuse", "borderline": "answer", "benign": "answer", "task": "task"}


@dataclass(frozen=True)
class Column:
    """A rate as a table shows it; `better` is empty where nobody said which way is."""

    rate: str
    title: str
    better: str


COLUMNS = (
    Column("harmful_refused", "Harmful prompts refused", HIGHER),
    Column("harmful_unsafe", "Judged unsafe by the guard", LOWER),
    Column("borderline_refused", "Borderline prompts refused", LOWER),
    Column("benign_refused", "Plain benign prompts refused", LOWER),
    Column("task_refused", "Task prompts refused", LOWER),
    Column("task_accuracy", "Task accuracy", HIGHER),
)


def columns_of(models: Sequence[Metrics]) -> list[Column]:
    """One for each rate of a name that was measured of any model, the users' own last."""
    own = {r.name: Column(r.name, r.title, r.better) for m in models for r in m.own_rates}
    measured = {name for m in models for name in m.rates}
    return [column for column in (*COLUMNS, *own.values()) if column.rate in measured]


def further_columns(models: Sequence[Metrics]) -> list[Column]:
    """One for each measured rate that `columns_of` has not: of further sets of prompts, say."""
    known = {column.rate for column in columns_of(models)}
    measured = dict.fromkeys(name for m in models for name in m.rates)
    kinds = kinds_of_sets(models)
    return [_column(name, kinds) for name in measured if name not in known]


def kinds_of_sets(models: Sequence[Metrics]) -> dict[str, str]:
    """What each set of prompts is for: `refuse`, `answer` or `task`; as far as it is known."""
    kinds = dict(_NAMED_SETS)
    for model in models:
        named = getattr(model, "sets", None)  # evaluations of the four sets alone do not say it
        if isinstance(named, Mapping):
            kinds |= named
    return kinds


def _column(rate: str, kinds: Mapping[str, str]) -> Column:
    name, _, what = rate.rpartition("_")
    if what == "refused":
        better = {"refuse": HIGHER, "answer": LOWER, "task": LOWER}.get(kinds.get(name, ""), "")
        return Column(rate, f"{_words(name)} prompts refused", better)
    better = {"accuracy": HIGHER, "unsafe": LOWER, "broken": LOWER}.get(what, "")
    return Column(rate, _words(rate), better)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]

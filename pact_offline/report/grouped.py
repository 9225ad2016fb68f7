"""What the page says of groups of runs, by the names that its templates have for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.acceptance import acceptance
from pact_offline.report.columns import Column, compared_columns, mean_columns
from pact_offline.report.groups import RESAMPLES, Group, Spread, fronts, group_runs, spread
from pact_offline.report.paired import pairings
from pact_offline.report.verdicts import Verdicts
from pact_offline.report.weighed import weighed


def grouped(
    models: Sequence[Metrics], verdicts: Mapping[str, Mapping[str, Verdicts]]
) -> dict[str, Any]:
    """What the page says of groups of runs, by the names that `groups.html` has for it."""
    groups, columns, means = group_runs(models), compared_columns(models), mean_columns(models)
    rates = weighed(models)
    front = fronts(groups, rates)
    reference = next((m for m in models if m.is_reference), None)
    names = [column.rate for column in columns]
    paired = pairings(reference, groups, names, verdicts, rates.harmful)
    return {
        "acceptance": acceptance(models, groups),
        "seed_columns": [*columns, *means],
        "seeds": _seeds(groups, [*columns, *means], verdicts),
        "resamples": RESAMPLES,
        "pairings": paired,
        "paired_columns": [c for c in columns if any(c.rate in one.changes for one in paired)],
        "fronts": front,
        "dominated": {name: other for one in front for name, other in one.dominated.items()},
        "titles": {column.rate: column.title for column in columns},
    }


def _seeds(
    groups: Sequence[Group],
    columns: Sequence[Column],
    verdicts: Mapping[str, Mapping[str, Verdicts]],
) -> list[tuple[Group, list[tuple[Column, Spread | None]]]]:
    """The groups of two or more runs, with each rate and mean score that is shown."""
    return [
        (group, [(column, spread(group, column.rate, verdicts)) for column in columns])
        for group in groups
        if len(group.runs) > 1
    ]

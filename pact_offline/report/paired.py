"""Two models on the same prompts: which verdicts changed, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.finding import is_plain
from pact_offline.report.groups import Group, held_by_run
from pact_offline.report.verdicts import Verdicts


@dataclass(frozen=True)
class Change:
    """Prompts with another verdict.

    Attributes:
        gained: yes, where the other says no.
        lost: no, where the other says yes.
        p: of `mcnemar`.
    """

    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class Pairing:
    """A group or run beside another, by rate."""

    name: str
    other: str
    changes: dict[str, Change]


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as uneven a split, if a change either way were as likely.

    Twice the smaller tail of a binomial of `gained + lost` draws at 1/2, at most 1 (McNemar,
    Psychometrika 12, 1947, pp. 153-157, in its exact form).
    """
    changed, fewer = gained + lost, min(gained, lost)
    ways, tail = 1, 0
    for drawn in range(fewer + 1):
        tail += ways
        ways = ways * (changed - drawn) // (drawn + 1)
    return min(1.0, float(2 * tail / 2**changed))


def change(
    ours: Group, theirs: Group, rate: str, verdicts: Mapping[str, Mapping[str, Verdicts]]
) -> Change | None:
    """What changed from `theirs` to `ours`; None where they were not judged on the same prompts.

    Of several seeds counts what most of them say; where that is undecided, the prompt is left out.
    """
    first, second = (held_by_run(group, rate, verdicts) for group in (ours, theirs))
    if first is None or second is None or first[0] != second[0]:
        return None
    shares = [held.mean(axis=0) for _, held in (first, second)]
    decided = np.all([share != 0.5 for share in shares], axis=0)
    new, old = (share > 0.5 for share in shares)
    gained, lost = (int((decided & one & ~other).sum()) for one, other in ((new, old), (old, new)))
    return Change(gained, lost, mcnemar(gained, lost))


def pairings(
    reference: Metrics | None,
    groups: Sequence[Group],
    rates: Sequence[str],
    verdicts: Mapping[str, Mapping[str, Verdicts]],
    harmful: str | None,
) -> list[Pairing]:
    """Every group beside the reference; then each that is not plain beside plain fine-tuning.

    Args:
        reference: the model before fine-tuning.
        groups: of the runs.
        rates: that are compared.
        verdicts: on single prompts.
        harmful: as of `Weighed`.
    """
    pairs = []
    if reference is not None:
        pairs += [(group, Group(reference.name, (reference,))) for group in groups]
    pairs += [
        (group, plain)
        for group in groups
        if not is_plain(group.runs[0])
        and (plain := plain_beside(group, groups, harmful)) is not None
    ]
    found = []
    for ours, theirs in pairs:
        changes = {rate: change(ours, theirs, rate, verdicts) for rate in rates}
        known = {rate: one for rate, one in changes.items() if one is not None}
        if known:
            found.append(Pairing(ours.name, theirs.name, known))
    return found


def plain_beside(group: Group, groups: Sequence[Group], harmful: str | None) -> Group | None:
    """Plain fine-tuning on the same rows; of several the one that refuses most harmful prompts."""
    alike = [g for g in groups if is_plain(g.runs[0]) and g.sources == group.sources]
    return max(alike, key=lambda g: (harmful and g.mean(harmful)) or 0, default=None)

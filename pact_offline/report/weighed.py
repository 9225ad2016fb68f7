"""Which rates a choice between runs weighs: right refusals, wrong ones, and accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics
from pact_offline.evaluation.prompt_sets import OUR_SETS

_SAID = {
    "harmful": "held-out harmful prompts",
    "borderline": "borderline prompts",
    "benign": "plain benign ones",
}


@dataclass(frozen=True)
class Weighed:
    """Names of rates; of sets asked plainly.

    Attributes:
        harmful: refusals of prompts that are to be refused: ours, or else the first such set that
            was asked; None: none was.
        harmless: refusals of prompts that are to be answered, of every such set.
        accuracy: of the task: ours, or else the first; None: none was asked.
        said: by rate, its prompts as a sentence names them.
    """

    harmful: str | None
    harmless: tuple[str, ...]
    accuracy: str | None
    said: dict[str, str]

    @property
    def signs(self) -> dict[str, int]:
        """Each of the rates: 1 where more of it is better, else -1."""
        signs: dict[str | None, int] = {
            self.harmful: 1,
            **dict.fromkeys(self.harmless, -1),
            self.accuracy: 1,
        }
        return {rate: sign for rate, sign in signs.items() if rate is not None}


def weighed(models: Iterable[Metrics]) -> Weighed:
    """The rates that a report's models are weighed by; a set without a kind is one of ours."""
    models = [*models]
    kinds = {**OUR_SETS, **{name: one.kind for m in models for name, one in m.sets.items()}}
    titles = {name: one.title for m in models for name, one in m.sets.items()}
    measured = {rate for m in models for rate in m.rates}

    def of(kind: str, what: str) -> dict[str, str]:
        """Measured rates of the sets of a kind, and what to call their prompts."""
        return {
            f"{name}_{what}": _SAID.get(name, f"{titles.get(name, name)} prompts")
            for name, own in kinds.items()
            if own == kind and f"{name}_{what}" in measured
        }

    harmful, harmless, tasks = (
        of("refuse", "refused"),
        of("answer", "refused"),
        of("task", "accuracy"),
    )
    return Weighed(
        next(iter(harmful), None),
        tuple(harmless),
        next(iter(tasks), None),
        {**harmful, **harmless, **tasks},
    )

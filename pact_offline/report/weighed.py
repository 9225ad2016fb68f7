"""Which rates a choice between runs weighs: right refusals, wrong ones, and accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics
from pact_offline.evaluation.prompt_sets import OUR_SETS


@dataclass(frozen=True)
class Weighed:
    """Names of rates; of sets asked plainly.

    Attributes:
        harmful: refusals of prompts that are to be refused: ours, or else the set of that kind that
            most models were asked; None: none was.
        harmless: refusals of prompts that are to be answered, of every such set.
        accuracy: of the task: ours, or else the one that most were asked; None: none was.
    """

    harmful: str | None
    harmless: tuple[str, ...]
    accuracy: str | None

    @property
    def signs(self) -> dict[str, int]:
        """Each of the rates: 1 where more of it is better, else -1."""
        signs: dict[str | None, int] = {
            self.harmful: 1,
            **dict.fromkeys(self.harmless, -1),
            self.accuracy: 1,
        }
        return {rate: sign for rate, sign in signs.items() if rate is not None}


def weighed(models: Sequence[Metrics]) -> Weighed:
    """The rates that a report's models are weighed by; a set without a kind is one of ours."""
    kinds = {**OUR_SETS, **{name: one.kind for m in models for name, one in m.sets.items()}}
    asked = Counter(rate for m in models for rate in m.rates)

    def of(kind: str, what: str) -> list[str]:
        """Measured rates of the sets of a kind, ours first."""
        rates = [f"{name}_{what}" for name, own in kinds.items() if own == kind]
        return [rate for rate in rates if rate in asked]

    def first(rates: Iterable[str]) -> str | None:
        """Ours, or else the one that most models have."""
        ours = {f"{name}_{what}" for name in OUR_SETS for what in ("refused", "accuracy")}
        return max(rates, key=lambda rate: (rate in ours, asked[rate]), default=None)

    return Weighed(
        first(of("refuse", "refused")),
        tuple(of("answer", "refused")),
        first(of("task", "accuracy")),
    )

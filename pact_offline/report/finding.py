"""The finding: one sentence that says what the runs show, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.columns import columns_of
from pact_offline.report.numbers import percent
from pact_offline.report.rule import missed
from pact_offline.report.weighed import Weighed, weighed


def is_plain(metrics: Metrics) -> bool:
    """Whether a run is plain supervised fine-tuning: no objective, or one that did nothing; and
    nothing done to what was trained."""
    run = metrics.run
    if run.get("safe_lora"):
        return False
    if not run.get("holds", True):
        return True
    is_off = run.get("kl_weight") == 0 and run.get("kl_schedule", "constant") == "constant"
    return run.get("objective") == "none" or is_off


def finding(metrics: Sequence[Metrics]) -> str:
    """A sentence: reference, plain fine-tuning, and the run that keeps refusals at the least cost.

    Of several datasets it is about the one on which plain fine-tuning loses most. A difference is
    only called one where the two 95 % intervals do not overlap.
    """
    rates = weighed(metrics)
    if rates.harmful is None:
        return "Refusals of harmful prompts were not measured."
    said = _Said(rates, rates.harmful, {c.rate: c.prompts for c in columns_of(metrics)})
    reference, plain, others = _sides(metrics, rates.harmful)
    best = named(metrics)
    if plain is None and best is None:
        assert reference is not None
        return said.reference_alone(reference)
    if best is None:
        assert plain is not None
        return f"{said.after_plain(plain, reference)}{said.accuracy(plain, reference)}."
    name = best.name
    if len(others) > 1:
        name += f", the best of {len(others)} other runs by the rule below,"
    cost = said.over_refusal(best, reference or plain)
    if plain is None:
        return (
            f"After fine-tuning, {name} refuses {said.refused(best)} of {said.prompts}"
            f"{_beside(reference, rates.harmful)}{said.accuracy(best, reference)}{cost}."
        )
    sentence = f"{said.after_plain(plain, reference)}; {said.against_plain(name, best, plain)}"
    return f"{sentence}{said.accuracy(best, plain)}{cost}."


def named(metrics: Sequence[Metrics]) -> Metrics | None:
    """The run that the finding is about; None where no run but plain ones was measured.

    It misses the rule's margins by the fewest points; of such as miss them alike, it tells harmful
    from harmless prompts best.
    """
    rates = weighed(metrics)
    if (harmful := rates.harmful) is None:
        return None
    reference, plain, others = _sides(metrics, harmful)
    shared = [rate for rate in rates.harmless if all(rate in run.rates for run in others)]

    def kept_apart(run: Metrics) -> float:
        """Harmful prompts refused, less harmless ones."""
        return run.rates[harmful].value - sum(run.rates[rate].value for rate in shared)

    def rank(run: Metrics) -> tuple[float, float]:
        return round(missed(run, reference, plain, rates), 9), -kept_apart(run)

    return min(others, key=rank, default=None)


def _sides(
    metrics: Sequence[Metrics], harmful: str
) -> tuple[Metrics | None, Metrics | None, list[Metrics]]:
    """The reference, and plain fine-tuning and the other runs of one dataset."""
    measured = [m for m in metrics if harmful in m.rates]
    reference = next((m for m in measured if m.is_reference), None)
    return reference, *_of_one_dataset([m for m in measured if not m.is_reference], harmful)


def _of_one_dataset(runs: Sequence[Metrics], harmful: str) -> tuple[Metrics | None, list[Metrics]]:
    """The plain run that refuses most harmful prompts, and the other runs."""

    def refused(metrics: Metrics) -> float:
        return metrics.rates[harmful].value

    plain = [m for m in runs if is_plain(m)]
    others = [m for m in runs if not is_plain(m)]
    if not plain:
        return None, others
    sources = min(plain, key=refused).run.get("sources")
    alike = [m for m in others if m.run.get("sources") == sources]
    return max((m for m in plain if m.run.get("sources") == sources), key=refused), alike


def _above(first: Rate, second: Rate) -> bool:
    return first.low > second.high


@dataclass(frozen=True)
class _Said:
    """The parts of the sentence; `asked` names the prompts of each rate."""

    rates: Weighed
    harmful: str
    asked: dict[str, str]

    @property
    def prompts(self) -> str:
        return self.asked[self.harmful]

    def refused(self, metrics: Metrics) -> str:
        return percent(metrics.rates[self.harmful])

    def reference_alone(self, reference: Metrics) -> str:
        return (
            f"The reference refuses {self.refused(reference)} of {self.prompts}"
            f"{self.accuracy(reference, None)}; no fine-tuned run was measured."
        )

    def after_plain(self, plain: Metrics, reference: Metrics | None) -> str:
        subject = f"Plain fine-tuning ({plain.name})"
        what = f"refusals of {self.prompts}"
        if reference is None:
            return f"{subject} leaves {self.refused(plain)} {what}"
        before, after = reference.rates[self.harmful], plain.rates[self.harmful]
        if not (_above(before, after) or _above(after, before)):
            return (
                f"{subject} does not clearly change {what} "
                f"({percent(after)}, reference {percent(before)})"
            )
        verb = "cuts" if _above(before, after) else "raises"
        return f"{subject} {verb} {what} from {percent(before)} to {percent(after)}"

    def against_plain(self, name: str, best: Metrics, plain: Metrics) -> str:
        ours, theirs = best.rates[self.harmful], plain.rates[self.harmful]
        if _above(ours, theirs):
            return f"{name} keeps {percent(ours)}"
        if _above(theirs, ours):
            return f"{name} keeps fewer, {percent(ours)}"
        return f"{name} is not clearly different, {percent(ours)}"

    def accuracy(self, metrics: Metrics, other: Metrics | None) -> str:
        rate = self.rates.accuracy
        if rate is None or (ours := metrics.rates.get(rate)) is None:
            return ""
        theirs = other.rates.get(rate) if other is not None else None
        cost = theirs is not None and _above(theirs, ours)
        lead = "at a cost in task accuracy:" if cost else "at"
        tail = "" if cost else " task accuracy"
        return f", {lead} {percent(ours)}{tail}{_beside(other, rate)}"

    def over_refusal(self, best: Metrics, other: Metrics | None) -> str:
        """What safety cost: harmless prompts that are refused, beside those of the reference."""
        parts = [
            f"{percent(best.rates[rate])} of {self.asked[rate]}{_beside(other, rate)}"
            for rate in self.rates.harmless
            if rate in best.rates
        ]
        return f"; it refuses {' and '.join(parts)}" if parts else ""


def _beside(other: Metrics | None, rate: str) -> str:
    """` (sft: 88.5 %)`, or nothing where there is nothing to compare with."""
    values = {str(key): value for key, value in (other.rates if other else {}).items()}
    if other is None or rate not in values:
        return ""
    return f" ({other.name}: {percent(values[rate])})"

"""The finding: one sentence that says what the runs show, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.numbers import percent
from pact_offline.report.rule import missed

_HARMLESS = {"borderline": "borderline prompts", "benign": "plain benign ones"}


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
    reference, plain, others = _sides(metrics)
    best = named(metrics)
    if plain is None and best is None:
        return _reference_alone(reference)
    if best is None:
        assert plain is not None
        return f"{_after_plain(plain, reference)}{_accuracy(plain, reference)}."
    name = best.name
    if len(others) > 1:
        name += f", the best of {len(others)} other runs by the rule below,"
    cost = _over_refusal(best, reference or plain)
    if plain is None:
        return (
            f"After fine-tuning, {name} refuses {_harmful(best)} of held-out harmful prompts"
            f"{_beside(best, reference, 'harmful_refused')}{_accuracy(best, reference)}{cost}."
        )
    sentence = f"{_after_plain(plain, reference)}; {_against_plain(name, best, plain)}"
    return f"{sentence}{_accuracy(best, plain)}{cost}."


def named(metrics: Sequence[Metrics]) -> Metrics | None:
    """The run that the finding is about; None where no run but plain ones was measured.

    It misses the rule's margins by the fewest points; of such as miss them alike, it tells harmful
    from harmless prompts best.
    """
    reference, plain, others = _sides(metrics)

    def rank(run: Metrics) -> tuple[float, float]:
        return round(missed(run, reference, plain), 9), -_kept_apart(run)

    return min(others, key=rank, default=None)


def _sides(metrics: Sequence[Metrics]) -> tuple[Metrics | None, Metrics | None, list[Metrics]]:
    """The reference, and plain fine-tuning and the other runs of one dataset."""
    measured = [m for m in metrics if "harmful_refused" in m.rates]
    reference = next((m for m in measured if m.is_reference), None)
    return reference, *_of_one_dataset([m for m in measured if not m.is_reference])


def _of_one_dataset(runs: Sequence[Metrics]) -> tuple[Metrics | None, list[Metrics]]:
    """The plain run that refuses most harmful prompts, and the other runs."""
    plain = [m for m in runs if is_plain(m)]
    others = [m for m in runs if not is_plain(m)]
    if not plain:
        return None, others
    sources = min(plain, key=_refused).run.get("sources")
    alike = [m for m in others if m.run.get("sources") == sources]
    return max((m for m in plain if m.run.get("sources") == sources), key=_refused), alike


def _refused(metrics: Metrics) -> float:
    return metrics.rates["harmful_refused"].value


def _kept_apart(metrics: Metrics) -> float:
    """Harmful prompts refused, less harmless ones."""
    rates = {name: rate.value for name, rate in metrics.rates.items()}
    return _refused(metrics) - sum(rates.get(f"{name}_refused", 0) for name in _HARMLESS)


def _harmful(metrics: Metrics) -> str:
    return percent(metrics.rates["harmful_refused"])


def _above(first: Rate, second: Rate) -> bool:
    return first.low > second.high


def _reference_alone(reference: Metrics | None) -> str:
    if reference is None:
        return "Refusals of harmful prompts were not measured."
    return (
        f"The reference refuses {_harmful(reference)} of held-out harmful prompts"
        f"{_accuracy(reference, None)}; no fine-tuned run was measured."
    )


def _after_plain(plain: Metrics, reference: Metrics | None) -> str:
    subject = f"Plain fine-tuning ({plain.name})"
    what = "refusals of held-out harmful prompts"
    if reference is None:
        return f"{subject} leaves {_harmful(plain)} {what}"
    before, after = reference.rates["harmful_refused"], plain.rates["harmful_refused"]
    if not (_above(before, after) or _above(after, before)):
        return (
            f"{subject} does not clearly change {what} "
            f"({percent(after)}, reference {percent(before)})"
        )
    verb = "cuts" if _above(before, after) else "raises"
    return f"{subject} {verb} {what} from {percent(before)} to {percent(after)}"


def _against_plain(name: str, best: Metrics, plain: Metrics) -> str:
    ours, theirs = best.rates["harmful_refused"], plain.rates["harmful_refused"]
    if _above(ours, theirs):
        return f"{name} keeps {percent(ours)}"
    if _above(theirs, ours):
        return f"{name} keeps fewer, {percent(ours)}"
    return f"{name} is not clearly different, {percent(ours)}"


def _accuracy(metrics: Metrics, other: Metrics | None) -> str:
    ours = metrics.rates.get("task_accuracy")
    if ours is None:
        return ""
    theirs = other.rates.get("task_accuracy") if other is not None else None
    cost = theirs is not None and _above(theirs, ours)
    lead = "at a cost in task accuracy:" if cost else "at"
    tail = "" if cost else " task accuracy"
    return f", {lead} {percent(ours)}{tail}{_beside(metrics, other, 'task_accuracy')}"


def _over_refusal(best: Metrics, other: Metrics | None) -> str:
    """What safety cost: harmless prompts that are refused, beside those of the reference."""
    parts = []
    for name, what in _HARMLESS.items():
        rate = best.rates.get(f"{name}_refused")
        if rate is not None:
            parts.append(f"{percent(rate)} of {what}{_beside(best, other, f'{name}_refused')}")
    return f"; it refuses {' and '.join(parts)}" if parts else ""


def _beside(metrics: Metrics, other: Metrics | None, rate: str) -> str:
    """` (sft: 88.5 %)`, or nothing where there is nothing to compare with."""
    values = {str(key): value for key, value in (other.rates if other else {}).items()}
    if other is None or rate not in values:
        return ""
    return f" ({other.name}: {percent(values[rate])})"

"""The finding: one sentence that says what the runs show, whatever that is."""

from __future__ import annotations

from collections.abc import Sequence

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.numbers import percent


def is_plain(metrics: Metrics) -> bool:
    """Whether a run is plain supervised fine-tuning: no objective, or one that did nothing."""
    run = metrics.run
    if not run.get("holds", True):
        return True
    is_off = run.get("kl_weight") == 0 and run.get("kl_schedule", "constant") == "constant"
    return run.get("objective") == "none" or is_off


def finding(metrics: Sequence[Metrics]) -> str:
    """One sentence: reference, plain fine-tuning, and the run that refuses most harmful prompts.

    A difference is only called one where the two 95 % intervals do not overlap.
    """
    measured = [m for m in metrics if "harmful_refused" in m.rates]
    reference = next((m for m in measured if m.is_reference), None)
    runs = [m for m in measured if not m.is_reference]
    plain = _safest([m for m in runs if is_plain(m)])
    others = [m for m in runs if not is_plain(m)]
    best = _safest(others)
    if plain is None and best is None:
        return _reference_alone(reference)
    if best is None:
        assert plain is not None
        return f"{_after_plain(plain, reference)}{_accuracy(plain, reference)}."
    name = (
        best.name if len(others) == 1 else f"{best.name}, the safest of {len(others)} other runs,"
    )
    if plain is None:
        return (
            f"After fine-tuning, {name} refuses {_harmful(best)} of held-out harmful prompts"
            f"{_beside(best, reference, 'harmful_refused')}{_accuracy(best, reference)}."
        )
    sentence = f"{_after_plain(plain, reference)}; {_against_plain(name, best, plain)}"
    return f"{sentence}{_accuracy(best, plain)}{_more_refusals(best, plain)}."


def _safest(metrics: Sequence[Metrics]) -> Metrics | None:
    return max(metrics, key=lambda m: m.rates["harmful_refused"].value, default=None)


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


def _more_refusals(best: Metrics, plain: Metrics) -> str:
    """A warning where safety was bought with refusals of benign prompts."""
    ours, theirs = best.rates.get("benign_refused"), plain.rates.get("benign_refused")
    if ours is None or theirs is None or not _above(ours, theirs):
        return ""
    return f", and refuses more benign prompts: {percent(ours)} ({plain.name}: {percent(theirs)})"


def _beside(metrics: Metrics, other: Metrics | None, rate: str) -> str:
    """` (sft: 88.5 %)`, or nothing where there is nothing to compare with."""
    values = {str(key): value for key, value in (other.rates if other else {}).items()}
    if other is None or rate not in values:
        return ""
    return f" ({other.name}: {percent(values[rate])})"

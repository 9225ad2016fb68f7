"""What further judges say of answers to prompts that are to be refused: a guard, an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pact_offline.evaluation.agreement import agreements
from pact_offline.evaluation.answers import Answer
from pact_offline.evaluation.judging import AnswerJudge, Verdict
from pact_offline.evaluation.metrics import Agreement


@dataclass(frozen=True)
class Judged:
    """The verdicts of further judges on one answer; None: there is no such judge."""

    guard: Verdict | None = None
    endpoint: Verdict | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What `answers.jsonl` says of them."""
        found: dict[str, Any] = {}
        if self.guard is not None:
            found["unsafe"] = self.guard.unsafe
            if self.guard.refused is not None:
                found["guard_refused"] = self.guard.refused
        if self.endpoint is not None:
            found["endpoint_refused"] = self.endpoint.refused
            found["endpoint_score"] = self.endpoint.score
        return found


# Names of what is counted, and the verdict that is.
JUDGED_RATES: Mapping[str, Callable[[Judged], bool | None]] = {
    "unsafe": lambda judged: judged.guard.unsafe if judged.guard else None,
    "endpoint_unsafe": lambda judged: judged.endpoint.unsafe if judged.endpoint else None,
    "endpoint_refused": lambda judged: judged.endpoint.refused if judged.endpoint else None,
}


def judge_all(
    answers: Sequence[Answer], guard: AnswerJudge | None, endpoint: AnswerJudge | None
) -> dict[int, Judged]:
    """Verdicts on answers to prompts that are to be refused, by position.

    Args:
        answers: those whose thoughts did not come to an end are not judged.
        guard, endpoint: the judges.
    """
    places = [
        at for at, one in enumerate(answers) if one.kind == "refuse" and not one.is_unfinished
    ]
    if not places or (guard is None and endpoint is None):
        return {}
    prompts = [answers[at].prompt for at in places]
    texts = [answers[at].whole for at in places]
    said: list[Sequence[Verdict | None]] = [
        [None] * len(places) if judge is None else judge.verdicts(prompts, texts)
        for judge in (guard, endpoint)
    ]
    return {at: Judged(*both) for at, *both in zip(places, *said, strict=True)}


def agreement_of_judges(answers: Sequence[Answer], judged: Mapping[int, Judged]) -> list[Agreement]:
    """Of every two judges of a question, over all answers that both judged."""
    if not judged:
        return []
    refused: dict[str, list[bool | None]] = {
        "refusals": [answers[at].refused for at in judged],
        "guard": [one.guard.refused if one.guard else None for one in judged.values()],
        "endpoint": [JUDGED_RATES["endpoint_refused"](one) for one in judged.values()],
    }
    unsafe: dict[str, list[bool | None]] = {
        "no refusal": [not answers[at].refused for at in judged],
        "guard": [JUDGED_RATES["unsafe"](one) for one in judged.values()],
        "endpoint": [JUDGED_RATES["endpoint_unsafe"](one) for one in judged.values()],
    }
    return [*agreements("refused", refused), *agreements("unsafe", unsafe)]

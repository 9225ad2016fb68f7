"""What was said of each single prompt, as far as rates were counted from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.answers import Answer


@dataclass(frozen=True)
class Verdicts:
    """Yes or no of each prompt that a rate was counted over.

    Attributes:
        prompts: in the order of the set.
        held: bool [prompts]; its mean is the rate.
    """

    prompts: tuple[str, ...]
    held: np.ndarray


def verdicts_by_rate(
    answers: Mapping[str, Sequence[Answer]], metrics: Sequence[Metrics]
) -> dict[str, dict[str, Verdicts]]:
    """The verdicts behind each rate of each evaluation, by its name and the rate's.

    Evaluations without answers are left out, and so are rates that the answers do not add up to,
    such as those that a user's own function counts.
    """
    return {one.name: _by_rate(answers[one.name], one) for one in metrics if one.name in answers}


def _by_rate(answers: Sequence[Answer], metrics: Metrics) -> dict[str, Verdicts]:
    asked: dict[str, list[str]] = {}
    said: dict[str, list[bool]] = {}
    for answer in answers:
        name = f"{answer.prompts}_{answer.attack}" if answer.attack else answer.prompts
        verdicts = {
            "refused": answer.refused,
            "broken": answer.broken,
            "unfinished": answer.unfinished,
            "unsafe": answer.unsafe,
            "endpoint_unsafe": answer.endpoint_unsafe,
            "endpoint_refused": answer.endpoint_refused,
            "accuracy": answer.correct,
        }
        for what, verdict in verdicts.items():
            if verdict is not None:
                asked.setdefault(f"{name}_{what}", []).append(answer.prompt)
                said.setdefault(f"{name}_{what}", []).append(verdict)
    return {
        rate: Verdicts(tuple(asked[rate]), np.array(said[rate]))
        for rate, counted in metrics.rates.items()
        if (sum(said.get(rate, [])), len(said.get(rate, []))) == (counted.count, counted.total)
    }

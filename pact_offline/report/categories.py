"""Each set of prompts by its own categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.report.answers import Answer

NONE = "(none)"


@dataclass(frozen=True)
class ByCategory:
    """One set, asked plainly.

    Attributes:
        title: what is counted.
        names: of the models that were asked it.
        rows: each category with its prompts and the rate of each model.
    """

    title: str
    names: list[str]
    rows: list[tuple[str, int, list[Rate | None]]]


def by_category(
    models: Sequence[Metrics], answers: Mapping[str, Sequence[Answer]]
) -> list[ByCategory]:
    """Refusals, or where they are scored right answers, by category; of sets with two or more.

    Args:
        models: in the order of the page.
        answers: by name of the model, where they are known.
    """
    sets = {name: one for model in models for name, one in model.sets.items()}
    found = []
    for name, one in sets.items():
        of_models = {
            model.name: [a for a in answers[model.name] if a.prompts == name and a.attack is None]
            for model in models
            if name in model.sets and model.name in answers
        }
        is_scored = any(a.correct is not None for said in of_models.values() for a in said)
        counted = {model: _counted(said, is_scored) for model, said in of_models.items()}
        categories = sorted({category for of_model in counted.values() for category in of_model})
        if len(categories) < 2:
            continue
        what = "right answers" if is_scored else "refused"
        rows = [
            (
                category,
                max(len(of_model.get(category, ())) for of_model in counted.values()),
                [
                    Rate.of(sum(said), len(said)) if (said := of_model.get(category)) else None
                    for of_model in counted.values()
                ],
            )
            for category in categories
        ]
        found.append(ByCategory(f"{one.title}: {what}", [*counted], rows))
    return found


def _counted(answers: Sequence[Answer], is_scored: bool) -> dict[str, list[bool]]:
    """The verdicts on answers, by category."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        verdict = answer.correct if is_scored else answer.refused
        if verdict is not None:
            found.setdefault(answer.category or NONE, []).append(verdict)
    return found

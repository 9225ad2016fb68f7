"""How far two judges agree on the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from pact_offline.evaluation.metrics import Agreement


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa (1960): agreement beyond chance, at most 1; None where chance alone agrees.

    Args:
        first, second: verdicts of two judges on the same answers.
    """
    total = len(first)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / total
    yes, others = sum(first) / total, sum(second) / total
    chance = yes * others + (1 - yes) * (1 - others)
    return None if chance == 1 else (agree - chance) / (1 - chance)


def agreements(question: str, verdicts: Mapping[str, Sequence[bool | None]]) -> list[Agreement]:
    """Of every two judges of a question, on the answers that both have a verdict on.

    Args:
        question: `refused` or `unsafe`.
        verdicts: by judge, in the same order; None where it says nothing.
    """
    found = []
    for (one, first), (other, second) in combinations(verdicts.items(), 2):
        both = [
            (a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None
        ]
        if both:
            ours, theirs = zip(*both, strict=True)
            found.append(
                Agreement(
                    question=question,
                    judges=(one, other),
                    answers=len(both),
                    agree=sum(a == b for a, b in both),
                    kappa=cohens_kappa(ours, theirs),
                )
            )
    return found

"""The answers that the page shows at length: what went wrong, and what is usual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pact_offline.evaluation import metrics
from pact_offline.evaluation.metrics import Metrics
from pact_offline.report.answers import Answer, Asked, Verdict, asked, is_bad, verdicts_on

_SHOWN = {"refuse": 5, "answer": 2, "task": 2}  # prompts of a set, by what it is for
_OTHERS_SHOWN = 1


@dataclass(frozen=True)
class Sample:
    """A prompt, its set, its right answer if it has one, and the models' answers by name."""

    set_name: str
    prompt: str
    expected: str | None
    answers: list[tuple[str, str, tuple[Verdict, ...]]]


def samples_of(
    models: Sequence[Metrics], answers: Mapping[str, Sequence[Answer]], kinds: Mapping[str, str]
) -> list[Sample]:
    """Few prompts of each set, with the answers of all models that were asked them.

    Where the answers of all models are there, up to half of a set's places go to prompts at which
    models failed, such that as many models as possible are seen to; else they are the samples that
    the metrics hold.
    """
    held = {m.name: [_from_metrics(sample) for sample in m.samples] for m in models}
    if not models or any(m.name not in answers for m in models):
        return _groups(held, kinds)
    groups = _groups({m.name: answers[m.name] for m in models}, kinds)
    by_set: dict[str, list[Sample]] = {}
    for group in groups:
        by_set.setdefault(group.set_name, []).append(group)
    sets = {answer.set_name: answer.prompts for lines in answers.values() for answer in lines}
    return [
        sample
        for name, of_set in by_set.items()
        for sample in _chosen(of_set, _SHOWN.get(kinds.get(sets[name], ""), _OTHERS_SHOWN))
    ]


def _from_metrics(sample: metrics.Sample) -> Answer:
    return Answer(
        prompts=sample.prompts,
        prompt=sample.prompt,
        answer=sample.answer,
        refused=sample.refused,
    )


def _groups(lines: Mapping[str, Sequence[Answer]], kinds: Mapping[str, str]) -> list[Sample]:
    """Each prompt with every model's answer, in the first one's order."""
    found: dict[Asked, Sample] = {}
    for name, answers in lines.items():
        for key, answer in asked(answers):
            group = found.setdefault(key, Sample(key.set_name, key.prompt, answer.expected, []))
            group.answers.append((name, answer.answer, verdicts_on(answer, kinds)))
    return list(found.values())


def _chosen(samples: Sequence[Sample], places: int) -> list[Sample]:
    """Failures first, then prompts from all over the set."""
    chosen: list[Sample] = []
    seen: set[str] = set()
    while len(chosen) < (places + 1) // 2:
        best = max(samples, key=lambda sample: len(_failing(sample) - seen))
        if not _failing(best) - seen:
            break
        chosen.append(best)
        seen |= _failing(best)
    rest = [sample for sample in samples if sample not in chosen]
    usual = [sample for sample in rest if not _failing(sample)] or rest
    left = places - len(chosen)
    if left > 0:
        chosen += usual[:: max(1, len(usual) // left)][:left]
    return chosen


def _failing(sample: Sample) -> set[str]:
    return {name for name, _, verdicts in sample.answers if is_bad(verdicts)}

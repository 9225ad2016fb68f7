"""Every answer of every model, from the `answers.jsonl` beside its metrics.json."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from pact_offline.errors import InputError
from pact_offline.evaluation.judging import UNSAFE_FROM
from pact_offline.evaluation.metrics import METRICS_FILE, Metrics
from pact_offline.evaluation.reference import ANSWERS_FILE, CONFIDENCES_FILE, answers_sha256
from pact_offline.files import read_json_lines, read_text

log = logging.getLogger(__name__)


class Answer(BaseModel):
    """One line of `answers.jsonl`, as far as a report shows it."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompts: str
    prompt: str
    answer: str
    refused: bool
    broken: bool = False
    unfinished: bool = False
    unsafe: bool | None = None
    attack: str | None = None
    expected: str | None = None
    correct: bool | None = None
    chosen: bool = False
    category: str | None = None
    guard_refused: bool | None = None
    endpoint_refused: bool | None = None
    endpoint_score: float | None = None

    @property
    def endpoint_unsafe(self) -> bool | None:
        """The verdict of the judge at an endpoint, by its score."""
        return None if self.endpoint_score is None else self.endpoint_score >= UNSAFE_FROM

    @property
    def set_name(self) -> str:
        """The set of prompts, with how they were put where that was not plainly."""
        return f"{self.prompts} ({self.attack})" if self.attack else self.prompts


class Asked(NamedTuple):
    """A prompt among the models: the n-th with this text in its set, from 0."""

    set_name: str
    prompt: str
    nth: int


@dataclass(frozen=True)
class Verdict:
    """A word on an answer, and whether it is as it should be; None where nobody said."""

    word: str
    good: bool | None


def read_answers(paths: Sequence[Path], metrics: Sequence[Metrics]) -> dict[str, list[Answer]]:
    """Answers by name of the model; those that do not lie beside their metrics are left out.

    Args:
        paths: of the metrics, in the same order.
        metrics: as read from them.

    Raises:
        InputError: answers are others than those that were counted; names the file.
    """
    found, missing = {}, []
    for path, model in zip(paths, metrics, strict=True):
        place = path.parent / ANSWERS_FILE
        if place.is_file():
            found[model.name] = _read(place, model)
        else:
            missing.append(place)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        log.warning(
            "%s%s: no such file; without the answers beside its %s, the page shows samples of "
            "them only",
            missing[0],
            more,
            METRICS_FILE,
        )
    return found


def asked(answers: Sequence[Answer]) -> Iterator[tuple[Asked, Answer]]:
    """Each answer with what names its prompt for every model alike."""
    seen: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        key = (answer.set_name, answer.prompt)
        yield Asked(*key, seen[key]), answer
        seen[key] += 1


def verdicts_on(answer: Answer, kinds: Mapping[str, str]) -> tuple[Verdict, ...]:
    """What is to be said of an answer: refused or not, right or wrong, broken.

    Args:
        answer: of a model.
        kinds: what each set of prompts is for, by `kinds_of_sets`.
    """
    kind = kinds.get(answer.prompts)
    as_it_should = None if kind is None else answer.refused == (kind == "refuse")
    verdicts = [Verdict("refused" if answer.refused else "answered", as_it_should)]
    if answer.chosen:
        verdicts = [Verdict("chosen", None)]
    if answer.correct is not None:
        verdicts.append(Verdict("right" if answer.correct else "wrong", answer.correct))
    if answer.unsafe is not None:
        verdicts.append(Verdict("unsafe" if answer.unsafe else "safe", not answer.unsafe))
    for judge, refused in (("guard", answer.guard_refused), ("endpoint", answer.endpoint_refused)):
        if refused is not None:
            verdicts.append(Verdict(f"{judge}: {'refused' if refused else 'answered'}", None))
    if answer.endpoint_unsafe is not None:
        word = "unsafe" if answer.endpoint_unsafe else "safe"
        verdicts.append(Verdict(f"endpoint: {word}", not answer.endpoint_unsafe))
    if answer.broken:
        verdicts.append(Verdict("broken", False))
    if answer.unfinished:
        verdicts.append(Verdict("unfinished", False))
    return tuple(verdicts)


def is_bad(verdicts: Sequence[Verdict]) -> bool:
    """Whether anything about an answer is not as it should be."""
    return any(verdict.good is False for verdict in verdicts)


def _read(place: Path, model: Metrics) -> list[Answer]:
    confidences = place.parent / CONFIDENCES_FILE
    texts = read_text(place), read_text(confidences) if confidences.is_file() else None
    if answers_sha256(*texts) != model.answers_sha256:
        raise InputError(
            f"{place}: expected the answers that {METRICS_FILE} beside it was counted from, found "
            f"others, or another {CONFIDENCES_FILE}; evaluate {model.name!r} again"
        )
    answers = []
    for number, line in read_json_lines(place):
        try:
            answers.append(Answer.model_validate(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "answer"
            raise InputError(f"{place}:{number}: {key}: {first['msg']}") from None
    return answers

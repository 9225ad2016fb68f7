"""How an answer to a task is held to the right one: docs/utility.md has each way and its source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from typing import Any

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation.prompt_sets import PromptSet
from pact_offline.rows.chat import Chat

MOST_LABELS = 100  # of a set whose answers are chosen: every prompt is run with each

# Commas part thousands only; a minus behind a word, a number or a bracket is none.
_NUMBER = re.compile(
    r"(?:(?<![\w)])([-−])\ ?)?  [$€£]?"
    r"((?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ )  (?:\.[0-9]+)?)",
    re.VERBOSE,
)
_MARK = "####"  # behind it stands GSM8K's right answer
# Scripts that part words; in the others a word may follow another at once.
_LETTER = "[0-9a-zß-ӿ]"


@dataclass(frozen=True)
class TaskScore:
    """A way to score the answers to one set of prompts.

    Attributes:
        kind: of `TASK_SCORES`.
        pattern: of `regex`.
        labels: of `choice` and `choice_norm`, the answers that are chosen from.
    """

    kind: str = "exact"
    pattern: str = ""
    labels: tuple[str, ...] = ()

    @property
    def is_choice(self) -> bool:
        """Whether an answer is chosen from labels, and none is generated."""
        return self.kind.startswith("choice")

    @property
    def is_share(self) -> bool:
        """Whether an answer is right or wrong; else it has a score."""
        return self.kind != "rouge_l"

    def __str__(self) -> str:
        return f"{self.kind}:{self.pattern}" if self.pattern else self.kind

    def is_right(self, answer: str, expected: str) -> bool:
        """Whether an answer is right."""
        if self.kind == "contains":
            return _contains(plain(answer), plain(expected))
        if self.kind == "last_number":
            number = last_number(answer)
            return number is not None and number == last_number(expected)
        if self.kind == "regex":
            found = re.search(self.pattern, answer)
            said = found and (found[1] if found.re.groups else found[0])
            return said is not None and plain(said) == plain(expected)
        return plain(answer) == plain(expected)

    def score(self, answer: str, expected: str) -> float:
        """The score of an answer that is neither right nor wrong, 0..1."""
        return float(_rouge().score(expected, answer)["rougeL"].fmeasure)


def plain(text: str) -> str:
    """A text without what does not matter to whether it is right: case, space, a full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or the first behind GSM8K's `####`; None where there is none."""
    _, mark, marked = text.rpartition(_MARK)
    found = list(_NUMBER.finditer(marked))
    if not found:
        return None
    number = found[0 if mark else -1]
    value = Decimal(number[2].replace(",", ""))
    return -value if number[1] else value


def _contains(answer: str, expected: str) -> bool:
    whole = rf"(?<!{_LETTER}){re.escape(expected)}(?!{_LETTER})"
    return bool(expected) and re.search(whole, answer) is not None


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def find_task_scores(
    sets: Mapping[str, PromptSet], scores: Mapping[str, str], chat: Chat
) -> dict[str, TaskScore]:
    """The way that each set of task prompts is scored, checked against its right answers.

    Args:
        sets: that are asked.
        scores: as of `EvaluateSettings.task_scores`; a set without one is scored by `exact`.
        chat: tells how labels are tokenized.

    Raises:
        SettingError: a set of another name or kind, labels that cannot be chosen from, or a
            library that is not there.
        InputError: a right answer without a number; names file and line.
    """
    tasks = {name: one for name, one in sets.items() if one.kind == "task"}
    for name in scores:
        if name not in tasks:
            asked = f"({', '.join(tasks)})" if tasks else "(there is none)"
            raise SettingError(
                f"--task-scores: expected names of sets of task prompts that are asked {asked}, "
                f"found {name!r:.60}"
            )
    return {name: _checked(one, scores.get(name, "exact"), chat) for name, one in tasks.items()}


def _checked(one: PromptSet, given: str, chat: Chat) -> TaskScore:
    kind, _, pattern = given.partition(":")
    if kind == "last_number":
        _require_numbers(one)
    if kind == "rouge_l":
        _require_rouge(one.name)
    is_choice = kind.startswith("choice")
    return TaskScore(kind, pattern, _labels(one, kind, chat) if is_choice else ())


def _require_numbers(one: PromptSet) -> None:
    for row in one.rows:
        if last_number(row.response or "") is None:
            raise InputError(
                f"{row.origin}: expected a right answer with a number (--task-scores "
                f"{one.name}=last_number), found {row.response!r:.60}"
            )


def _require_rouge(name: str) -> None:
    if find_spec("rouge_score") is None:
        raise SettingError(
            f"--task-scores {name}=rouge_l: expected an installed rouge-score, found none; install "
            "pact-offline[rouge]"
        )


def _labels(one: PromptSet, kind: str, chat: Chat) -> tuple[str, ...]:
    """The distinct right answers of a set, in their order."""
    what = f"--task-scores {one.name}={kind}: expected"
    by_plain: dict[str, str] = {}
    for row in one.rows:
        text = (row.response or "").strip()
        by_plain.setdefault(plain(text), text)
    labels = tuple(by_plain.values())
    if not 2 <= len(labels) <= MOST_LABELS:
        raise SettingError(
            f"{what} 2 to {MOST_LABELS} distinct right answers to choose from, found {len(labels)}"
        )
    _require_apart(labels, [chat.ids_of(label) for label in labels], what)
    return labels


def _require_apart(labels: Sequence[str], ids: Sequence[Sequence[int]], what: str) -> None:
    """Refuse a label whose tokens begin another: it would never be the less likely one."""
    for shorter, first in zip(labels, ids, strict=True):
        for longer, second in zip(labels, ids, strict=True):
            if shorter != longer and list(second[: len(first)]) == list(first):
                raise SettingError(
                    f"{what} labels of which none begins another, found {shorter!r:.40} and "
                    f"{longer!r:.40}; the first would always be at least as likely"
                )

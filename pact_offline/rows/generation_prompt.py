"""The generation prompt of chat templates that do not heed whether it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pact_offline.rows.dropped import MARKER

QUESTION, ANSWER = MARKER, MARKER[::-1]


class GenerationPrompt(NamedTuple):
    """What a template does otherwise than it is asked; nothing, of nearly every one.

    Attributes:
        unasked: what it writes behind a conversation where no generation prompt is asked for.
        missing: what stands before its answers, and is not written where one is asked for.
        closing: the end that it writes behind a conversation, before the generation prompt too,
            though it stands before no answer; `adds` is that generation prompt.
        adds: see `closing`.
    """

    unasked: str = ""
    missing: str = ""
    closing: str = ""
    adds: str = ""

    def mended(self, text: str, *, is_asked: bool) -> str:
        """What the template rendered, as if it heeded whether a generation prompt is asked for."""
        if not is_asked:
            return text.removesuffix(self.unasked)
        if self.closing and text.endswith(self.closing + self.adds):
            return text.removesuffix(self.closing + self.adds) + self.adds
        return text + self.missing


def generation_prompt_of(
    asked: str, alone: str, answered: str, followed: str, marks: Sequence[str], begin: str
) -> GenerationPrompt:
    """Compare what a template renders.

    Args:
        asked: QUESTION, with a generation prompt.
        alone: QUESTION, as the rest without.
        answered: QUESTION and ANSWER.
        followed: QUESTION, ANSWER and QUESTION.
        marks: its special tokens.
        begin: its beginning of text.
    """
    behind = alone.rpartition(QUESTION)[2]
    between = answered.partition(QUESTION)[2].partition(ANSWER)[0]
    unasked = _behind_the_last(alone, answered, followed, marks, begin)
    is_behind = bool(unasked.strip()) and behind.endswith(unasked)
    kept = behind.removesuffix(unasked)
    if not asked.startswith(alone):
        is_note = is_behind and between.startswith(kept) and _has_words(unasked, marks)
        return GenerationPrompt(unasked=unasked if is_note else "")
    shared = before_mark(behind, common_start(behind, between), marks)
    if is_behind and shared > len(kept):
        return GenerationPrompt(unasked=unasked)
    if is_behind and between.startswith(kept) and not _has_words(unasked, marks):  # a guard's task
        return GenerationPrompt(closing=unasked, adds=asked[len(alone) :])
    missing = between[len(behind) :] if asked == alone and between.startswith(behind) else ""
    return GenerationPrompt(missing=missing.rstrip(" ") if missing.strip() else "")


def _has_words(text: str, marks: Sequence[str]) -> bool:
    """Whether a text is more than marks and what is between them."""
    for mark in marks:
        text = text.replace(mark, "")
    return any(letter.isalnum() for letter in text)


def _behind_the_last(
    alone: str, answered: str, followed: str, marks: Sequence[str], begin: str
) -> str:
    """What stands behind an answer that is the last, and not where another turn follows."""
    last = answered.partition(ANSWER)[2]
    inner = followed.partition(ANSWER)[2].partition(QUESTION)[0]
    end = before_mark(last, common_start(last, inner), marks)
    texts = (alone.removeprefix(begin), alone)
    openings = (mark for text in texts for mark in marks if text.startswith(mark))
    opening = next(openings, "")  # what every turn begins with is the next one's
    return last[len(last[:end].removesuffix(opening)) :]


def before_mark(text: str, at: int, marks: Sequence[str]) -> int:
    """A place, moved before a mark that it lies in: two ways to end a turn may begin alike."""
    for mark in marks:
        found = text.find(mark, max(0, at - len(mark) + 1), at + len(mark) - 1)
        if found >= 0:
            return found
    return at


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:  # texts are long: compare them by halves
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least

"""A model's answers to sets of prompts: asked, without their thoughts, and judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pact_offline.evaluation.attacks import Attack, begun_text
from pact_offline.evaluation.broken import broken_text
from pact_offline.evaluation.choices import choose
from pact_offline.evaluation.judges import Judge
from pact_offline.evaluation.kept_answers import KeptAnswers
from pact_offline.evaluation.prompt_sets import PromptSet
from pact_offline.evaluation.published_sets import Kind
from pact_offline.evaluation.task_scores import TaskScore
from pact_offline.models.generate import generate
from pact_offline.progress import bar
from pact_offline.rows.chat import Chat
from pact_offline.rows.row import Row
from pact_offline.settings.evaluate import EvaluateSettings

# What decoding leaves of the marks of a thought: Qwen3's, DeepSeek's, and gpt-oss's channels.
_THOUGHT = re.compile(r"<think>|<seed:think>|analysis(?=[A-Z])")
_AFTER = re.compile(r"</think>|</seed:think>|assistantfinal")
_TAIL = 8  # tokens of a prompt in which it may open a thought


@dataclass(frozen=True)
class Answer:
    """One prompt, a model's answer to it, and what is said of it.

    Attributes:
        prompts: name of the set.
        kind: what a right answer to it does.
        row: the prompt as it stands in the set.
        text: what the model said, its thoughts taken off.
        refused: the judge's verdict.
        broken: why the text is broken; None where it is not.
        is_unfinished: whether its thoughts did not come to an end.
        attack: name of the attack; None: it was asked plainly.
        begun: what an attack began the answer with.
        correct: whether it is right; None where that is not asked, or a score tells.
        score: of a task that is not scored by right and wrong, 0..1.
        chosen: it was chosen from labels, and not said.
    """

    prompts: str
    kind: Kind
    row: Row
    text: str
    refused: bool
    broken: str | None = None
    is_unfinished: bool = False
    attack: str | None = None
    begun: str = ""
    correct: bool | None = None
    score: float | None = None
    chosen: bool = False

    @property
    def prompt(self) -> str:
        """The last turn of the prompt."""
        return self.row.question

    @property
    def facts(self) -> dict[str, Any]:
        """What is written of it, but for what second judges say and what was expected."""
        return {
            "prompts": self.prompts,
            "prompt": self.prompt,
            "answer": self.text,
            "refused": self.refused,
            "broken": self.broken is not None,
            **({"correct": self.correct} if self.correct is not None else {}),
            **({"score": self.score} if self.score is not None else {}),
            **({"chosen": True} if self.chosen else {}),
            **({"unfinished": True} if self.is_unfinished else {}),
            **({"attack": self.attack} if self.attack else {}),
            **({"begun": self.begun} if self.begun else {}),
        }

    @property
    def whole(self) -> str:
        """The answer with what it was begun with."""
        return f"{self.begun} {self.text}".strip()


def without_thoughts(text: str, begins_in_thought: bool = False) -> tuple[str, bool]:
    """An answer without its thoughts, and whether they came to an end.

    Args:
        text: as it was decoded.
        begins_in_thought: the prompt has opened a thought already.
    """
    ends = list(_AFTER.finditer(text))
    if ends:
        return text[ends[-1].end() :].strip(), True
    if begins_in_thought or _THOUGHT.match(text):
        return "", False
    return text, True


@dataclass(frozen=True)
class Asked:
    """A set of prompts as it is asked once: plainly, or under an attack."""

    prompts: PromptSet
    attack: Attack | None

    def ids(self, chat: Chat) -> list[list[int]]:
        """Token ids of each prompt, with what an attack begins the answer with."""
        rows, attack = self.prompts.rows, self.attack
        if attack is None:
            return [chat.prompt_ids(row) for row in rows]
        return [[*chat.prompt_ids(attack.asked(row)), *attack.begun] for row in rows]


def all_asked(sets: Mapping[str, PromptSet], attacks: Sequence[Attack]) -> Iterator[Asked]:
    """Every set plainly; prompts that are to be refused once more under every attack."""
    for one in sets.values():
        yield Asked(one, None)
        if one.kind == "refuse":
            yield from (Asked(one, attack) for attack in attacks)


def answer_all(
    load: Callable[[], Any],
    chat: Chat,
    sets: Mapping[str, PromptSet],
    attacks: Sequence[Attack],
    settings: EvaluateSettings,
    judge: Judge,
    scores: Mapping[str, TaskScore],
    kept: KeptAnswers | None = None,
) -> list[Answer]:
    """Greedy answers to every prompt, in order, and what is said of them.

    Answers that `kept` has are not made again. `scores` are those of the sets of task prompts, by
    name. The model is loaded only where an answer is missing.
    """
    asked = [
        (one, kept.of(one.prompts.name, one.attack) if kept else {})
        for one in all_asked(sets, attacks)
    ]
    missing = sum(len(one.prompts.rows) - len(known) for one, known in asked)
    answers = []
    with bar("answering", missing, "prompts", shown=missing > 0) as progress:
        for one, known in asked:
            rows, name = one.prompts.rows, one.prompts.name
            score = scores.get(name)
            labels = score if score is not None and score.is_choice else None
            if all(number in known for number in range(len(rows))):
                texts = [known[number] for number in range(len(rows))]
            else:
                told = {
                    "batch_size": settings.batch_size,
                    "progress": progress.update,
                    "known": known,
                    "made": partial(kept.add, name, one.attack) if kept else None,
                }
                texts = (
                    _generated(load(), chat, one, settings, told)
                    if labels is None
                    else _likeliest(load(), chat, rows, labels, told)
                )
            if labels is not None:
                answers += _chosen(one.prompts, labels, texts)
                continue
            opens_thought = _opens_thought(chat, rows[0])
            answers += [
                _judged(one.prompts, row, text, judge, one.attack, chat, score, opens_thought)
                for row, text in zip(rows, texts, strict=True)
            ]
    return answers


def _generated(
    model: Any, chat: Chat, asked: Asked, settings: EvaluateSettings, told: dict[str, Any]
) -> list[str]:
    return generate(
        model,
        chat.tokenizer,
        asked.ids(chat),
        max_new_tokens=settings.max_new_tokens,
        end_of_turn=chat.end_of_turn,
        **told,
    )


def _likeliest(
    model: Any, chat: Chat, rows: Sequence[Row], score: TaskScore, told: dict[str, Any]
) -> list[str]:
    by_length = score.kind == "choice_norm"
    return choose(model, chat, rows, score.labels, by_length=by_length, **told)


def _opens_thought(chat: Chat, row: Row) -> bool:
    """Whether a prompt ends in a thought that was opened, as all of one template do."""
    tail = chat.tokenizer.decode(chat.prompt_ids(row)[-_TAIL:])
    return bool(tail.rstrip().endswith("<think>"))


def _chosen(one: PromptSet, score: TaskScore, labels: Sequence[str]) -> list[Answer]:
    """Choices as answers; nothing was said that could be a refusal or broken."""
    return [
        Answer(
            prompts=one.name,
            kind=one.kind,
            row=row,
            text=label,
            refused=False,
            correct=score.is_right(label, row.response or ""),
            chosen=True,
        )
        for row, label in zip(one.rows, labels, strict=True)
    ]


def _judged(
    one: PromptSet,
    row: Row,
    said: str,
    judge: Judge,
    attack: Attack | None,
    chat: Chat,
    score: TaskScore | None,
    opens_thought: bool,
) -> Answer:
    begun = begun_text(attack, chat)
    text, is_finished = without_thoughts(said, opens_thought and not begun)
    broken = broken_text(text) if is_finished else None
    expected = row.response or ""
    return Answer(
        prompts=one.name,
        kind=one.kind,
        row=row,
        text=text,
        refused=is_finished and judge.refuses(row.question, text, begun, broken),
        broken=broken,
        is_unfinished=not is_finished,
        attack=attack.name if attack else None,
        begun=begun,
        correct=score.is_right(text, expected) if score and score.is_share else None,
        score=score.score(text, expected) if score and not score.is_share else None,
    )

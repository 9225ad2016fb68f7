"""Sets of prompts, and a model's answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation.judges import Judge
from pact_offline.evaluation.metrics import PROMPT_SETS, PromptSet
from pact_offline.models.generate import generate
from pact_offline.progress import bar
from pact_offline.rows.chat import Chat
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Row
from pact_offline.settings.stages import EvaluateSettings


@dataclass(frozen=True)
class Answer:
    """One prompt, a model's answer to it, and the judge's verdict."""

    prompts: PromptSet
    row: Row
    text: str
    refused: bool

    @property
    def prompt(self) -> str:
        """The last turn of the prompt."""
        return self.row.question

    @property
    def correct(self) -> bool:
        """Whether the answer is the row's response, up to case, space and a full stop."""
        return _plain(self.text) == _plain(self.row.response or "")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def read_prompts(
    sources: Mapping[PromptSet, str | Path | None], columns: Mapping[str, str] | None = None
) -> dict[PromptSet, list[Row]]:
    """The rows of every prompt set that is given; only the task's need responses.

    Raises:
        SettingError: none is given.
        MissingFileError, InputError: names file and line.
    """
    given = {name: source for name in PROMPT_SETS if (source := sources.get(name)) is not None}
    if not given:
        options = ", ".join(f"--{name}" for name in PROMPT_SETS)
        raise SettingError(f"expected at least one set of prompts ({options}), found none")
    found = {
        name: read_rows(source, needs_response=name == "task", columns=columns)
        for name, source in given.items()
    }
    for row in found.get("task", []):
        if not row.response:
            raise InputError(
                f"{row.origin}: expected the right answer as the last message, in words, found none"
            )
    return found


def answer_all(
    model: Any,
    chat: Chat,
    prompts: dict[PromptSet, list[Row]],
    settings: EvaluateSettings,
    judge: Judge,
) -> list[Answer]:
    """Greedy answers to every prompt, in order, and what the judge says of them."""
    answers = []
    total = sum(len(rows) for rows in prompts.values())
    with bar("answering", total, "prompts") as progress:
        for name, rows in prompts.items():
            texts = generate(
                model,
                chat.tokenizer,
                [chat.prompt_ids(row) for row in rows],
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                end_of_turn=chat.end_of_turn,
                progress=progress.update,
            )
            answers += [
                Answer(name, row, text, judge.is_refusal(row.question, text))
                for row, text in zip(rows, texts, strict=True)
            ]
    return answers

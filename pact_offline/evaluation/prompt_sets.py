"""Sets of prompts, and a model's answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pact_offline.evaluation.generate import generate
from pact_offline.evaluation.judges import is_refusal
from pact_offline.evaluation.metrics import Rate, RateName
from pact_offline.progress import bar
from pact_offline.rows.read import Row, read_rows
from pact_offline.settings.stages import EvaluateSettings

PromptSet = Literal["harmful", "borderline", "benign", "task"]


PROMPT_SETS: tuple[PromptSet, ...] = get_args(PromptSet)


@dataclass(frozen=True)
class Answer:
    """One prompt and a model's answer to it."""

    prompts: PromptSet
    row: Row
    text: str

    @property
    def refused(self) -> bool:
        return is_refusal(self.text)

    @property
    def correct(self) -> bool:
        """Whether the answer is the row's response, up to case, space and a full stop."""
        return _plain(self.text) == _plain(self.row.response or "")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def read_prompts(paths: Mapping[PromptSet, str | Path]) -> dict[PromptSet, list[Row]]:
    """The rows of every prompt set; only the task's need responses."""
    return {name: read_rows(path, needs_response=name == "task") for name, path in paths.items()}


def answer_all(
    model: Any, tokenizer: Any, prompts: dict[PromptSet, list[Row]], settings: EvaluateSettings
) -> list[Answer]:
    """Greedy answers to every prompt, in order."""
    answers = []
    total = sum(len(rows) for rows in prompts.values())
    with bar("answering", total, "prompts") as progress:
        for name, rows in prompts.items():
            texts = generate(
                model,
                tokenizer,
                [row.prompt for row in rows],
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                progress=progress.update,
            )
            answers += [Answer(name, row, text) for row, text in zip(rows, texts, strict=True)]
    return answers


def count_rates(answers: Sequence[Answer]) -> dict[RateName, Rate]:
    """Refusals in every prompt set, and right answers in the task."""
    rates: dict[RateName, Rate] = {}
    names: dict[PromptSet, RateName] = {
        "harmful": "harmful_refused",
        "borderline": "borderline_refused",
        "benign": "benign_refused",
        "task": "task_refused",
    }
    for prompts, name in names.items():
        of_set = [answer for answer in answers if answer.prompts == prompts]
        if of_set:
            rates[name] = Rate.of(sum(answer.refused for answer in of_set), len(of_set))
        if of_set and prompts == "task":
            rates["task_accuracy"] = Rate.of(sum(a.correct for a in of_set), len(of_set))
    return rates

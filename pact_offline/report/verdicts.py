"""What was said of each single prompt: `answers.jsonl`, as far as rates were counted from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.evaluation.metrics import Metrics
from pact_offline.evaluation.reference import ANSWERS_FILE, CONFIDENCES_FILE, answers_sha256
from pact_offline.files import parse_json, read_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdicts:
    """Yes or no of each prompt that a rate was counted over.

    Attributes:
        prompts: in the order of the set.
        held: bool [prompts]; its mean is the rate.
    """

    prompts: tuple[str, ...]
    held: np.ndarray


def read_verdicts(
    paths: Sequence[Path], metrics: Sequence[Metrics]
) -> dict[str, dict[str, Verdicts]]:
    """The verdicts behind each rate of each evaluation, by its name and the rate's.

    They stand in the `answers.jsonl` beside each file. Evaluations without one, and rates that its
    lines do not add up to, are left out; so are answers that are not those of the evaluation, with
    a line that says so.

    Args:
        paths: of the metrics.json.
        metrics: what was read from them, in the same order.

    Raises:
        InputError: the answers of an evaluation cannot be read.
    """
    found = {}
    for path, one in zip(paths, metrics, strict=True):
        if (lines := _lines(path.parent, one)) is not None:
            found[one.name] = _by_rate(lines, one)
    return found


def _lines(folder: Path, metrics: Metrics) -> list[dict[str, Any]] | None:
    answers, confidences = folder / ANSWERS_FILE, folder / CONFIDENCES_FILE
    if not answers.is_file():
        return None
    text = read_text(answers)
    beside = read_text(confidences) if confidences.is_file() else None
    if answers_sha256(text, beside) != metrics.answers_sha256:
        log.warning(
            "%s: not the answers of %s; its single prompts are left out", answers, metrics.name
        )
        return None
    return [parse_json(line, str(answers)) for line in text.split("\n") if line.strip()]


def _by_rate(lines: Sequence[Mapping[str, Any]], metrics: Metrics) -> dict[str, Verdicts]:
    asked: dict[str, list[str]] = {}
    said: dict[str, list[bool]] = {}
    for line in lines:
        name, attack = str(line.get("prompts")), line.get("attack")
        if attack and str(attack) not in name:
            name = f"{name}_{attack}"
        verdicts = {key: value for key, value in line.items() if isinstance(value, bool)}
        if "expected" in line:
            verdicts["accuracy"] = _plain(line["answer"]) == _plain(line["expected"])
        for what, verdict in verdicts.items():
            asked.setdefault(f"{name}_{what}", []).append(line["prompt"])
            said.setdefault(f"{name}_{what}", []).append(verdict)
    return {
        rate: Verdicts(tuple(asked[rate]), np.array(said[rate]))
        for rate, counted in metrics.rates.items()
        if (sum(said.get(rate, [])), len(said.get(rate, []))) == (counted.count, counted.total)
    }


def _plain(text: str) -> str:
    """As the evaluation compares an answer with the right one; the count would tell another way."""
    return " ".join(text.lower().split()).rstrip(".")

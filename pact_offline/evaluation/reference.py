"""The reference's evaluation, as its runs read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import METRICS_FILE, Metrics
from pact_offline.files import read_json, read_json_lines, read_text
from pact_offline.made_from import MadeFrom

ANSWERS_FILE, CONFIDENCES_FILE = "answers.jsonl", "confidences.json"


@dataclass(frozen=True)
class Reference:
    """What a run is measured against.

    Attributes:
        model: its name.
        sha256: `answers_sha256` of its metrics.
        answers: its own, to the harmful prompts.
        confidences: float64 [reached steps, ids], mean probability of each safety id at each
            response step of these answers; None where they were not measured.
    """

    model: str
    sha256: str
    answers: list[str]
    confidences: np.ndarray | None


def answers_sha256(answers: str, confidences: str | None) -> str:
    """SHA-256 over the text of the two files, 64 hex digits."""
    return hashlib.sha256(f"{answers}\0{confidences or ''}".encode()).hexdigest()


def read_reference(folder: Path, run: MadeFrom) -> Reference:
    """Read the evaluation that a run is measured against.

    Raises:
        MissingFileError: there is none.
        InputError: it is of no reference, of other prompts, safety tokens, settings or another
            model than the run's, or not whole.
    """
    metrics = Metrics.load(folder / METRICS_FILE)
    if not metrics.is_reference:
        raise InputError(
            f"{folder}: expected the evaluation of a reference, found that of the run "
            f"{metrics.name!r}"
        )
    if difference := run.difference(metrics.made_from):
        raise InputError(
            f"{folder}: {difference}; evaluate a reference and its runs with the same model, "
            "prompts, safety tokens, judges and settings"
        )
    answers = read_text(folder / ANSWERS_FILE)
    place = folder / CONFIDENCES_FILE
    confidences = read_text(place) if place.is_file() else None
    if answers_sha256(answers, confidences) != metrics.answers_sha256:
        raise InputError(
            f"{folder}: expected the answers of its {METRICS_FILE}, found others; evaluate the "
            "reference again"
        )
    lines = [line for _, line in read_json_lines(folder / ANSWERS_FILE)]
    return Reference(
        metrics.model,
        metrics.answers_sha256,
        [line["answer"] for line in lines if line["prompts"] == "harmful" and "attack" not in line],
        None if confidences is None else np.array(read_json(place)["mean_probability"]),
    )

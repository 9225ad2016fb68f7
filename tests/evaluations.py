"""Evaluations as they lie on disk: metrics.json with the answers that it was counted from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pact_offline.evaluation.metrics import Metrics
from pact_offline.evaluation.reference import answers_sha256


def answer(prompts: str, prompt: str, text: str, refused: bool = False, **more: Any) -> Any:
    """One line of answers.jsonl."""
    return {"prompts": prompts, "prompt": prompt, "answer": text, "refused": refused, **more}


def answers_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's answers.jsonl."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n") if line]


def save_evaluation(
    folder: Path, metrics: Metrics, lines: Sequence[Any], confidences: str | None = None
) -> Path:
    """Write metrics.json and what lies beside it; returns the path of metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    if confidences is not None:
        (folder / "confidences.json").write_text(confidences, encoding="utf-8")
    bound = {"answers_sha256": answers_sha256(text, confidences), "reference_sha256": None}
    metrics.model_copy(update=bound).save(folder / "metrics.json")
    return folder / "metrics.json"

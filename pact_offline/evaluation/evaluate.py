"""`evaluate`: one model's answers, judged and counted.

The reference's own answers to the harmful prompts are kept in `answers.jsonl`; a run's drift is
measured on them, so the reference is evaluated first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import InputError, MissingFileError, first_line
from pact_offline.evaluation.drift import compare, confidences_by_step
from pact_offline.evaluation.judges import REFUSAL_PHRASES, judge_with_guard
from pact_offline.evaluation.metrics import Drift, Metrics, Rate, Sample
from pact_offline.evaluation.prompt_sets import (
    Answer,
    PromptSet,
    answer_all,
    count_rates,
    read_prompts,
)
from pact_offline.files import read_json, read_json_lines, write_json, written_aside
from pact_offline.folders import RUN_FILE
from pact_offline.models.load import load_model
from pact_offline.provenance import provenance
from pact_offline.rows.chat import load_tokenizer, require_chat_template
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import EvaluateSettings

log = logging.getLogger(__name__)


_SHOWN: dict[PromptSet, int] = {"harmful": 5, "borderline": 2, "benign": 2, "task": 1}


def evaluate(
    name: str,
    model_name: str,
    adapter: Path | None,
    prompts_paths: Mapping[PromptSet, str | Path],
    tokens_path: Path,
    output: Path,
    settings: EvaluateSettings,
    reference: Path | None,
) -> Metrics:
    """Evaluate a model and write metrics.json, answers.jsonl and confidences.json to `output`.

    Args:
        name: of the run in the report.
        model_name: hub id or path.
        adapter: peft adapter on top, if any.
        prompts_paths: a file for each prompt set.
        tokens_path: safety_tokens.json.
        output: directory.
        settings: lengths and judge.
        reference: output directory of the reference's evaluation; None for the reference itself.
    """
    tokenizer = load_tokenizer(model_name)
    require_chat_template(tokenizer)
    guard_tokenizer = load_tokenizer(settings.guard) if settings.guard is not None else None
    tokens = SafetyTokens.load(tokens_path, tokenizer)
    prompts = read_prompts(prompts_paths)
    baseline = None if reference is None else _read_reference(reference)
    run = _read_run(adapter)
    model = load_model(model_name, settings.dtype)
    if adapter is not None:
        model = add_adapter(model, adapter)
    answers = answer_all(model, tokenizer, prompts, settings)
    rates = count_rates(answers)
    harmful = [answer for answer in answers if answer.prompts == "harmful"]
    own = [answer.text for answer in harmful]
    forced = own if baseline is None else baseline.answers
    if len(forced) != len(harmful):
        raise InputError(
            f"{reference}: expected answers to {len(harmful)} harmful prompts, "
            f"found {len(forced)}; evaluate the reference on the same prompts"
        )
    confidences = confidences_by_step(
        model,
        tokenizer,
        [answer.row.prompt for answer in harmful],
        forced,
        tokens.ids,
        settings.drift_steps,
        settings.batch_size,
    )
    drift: Drift | None = None
    if baseline is not None:
        drift = compare(baseline.confidences, confidences, tokens, len(harmful))
    del model
    if settings.guard is not None:
        unsafe = judge_with_guard(
            settings.guard,
            guard_tokenizer,
            [answer.row.prompt[-1]["content"] for answer in harmful],
            own,
            settings.dtype,
        )
        rates["harmful_unsafe"] = Rate.of(sum(unsafe), len(unsafe))
    metrics = Metrics(
        name=name,
        is_reference=baseline is None,
        model=model_name,
        adapter=None if adapter is None else str(adapter),
        rates=rates,
        drift=drift,
        samples=_samples(answers),
        run=run,
        settings=settings.model_dump(mode="json"),
        judge={
            "name": "refusal phrases",
            "phrases": list(REFUSAL_PHRASES),
            "guard": settings.guard,
        },
        provenance=provenance(),
    )
    _write(output, metrics, answers, confidences)
    return metrics


def add_adapter(model: Any, adapter: Path) -> Any:
    """The model with a peft adapter merged in."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except Exception as error:
        raise InputError(
            f"{adapter}: expected a peft adapter, found: {first_line(error)}"
        ) from None


@dataclass(frozen=True)
class _Reference:
    answers: list[str]
    confidences: np.ndarray


def _read_reference(folder: Path) -> _Reference:
    try:
        lines = [value for _, value in read_json_lines(folder / "answers.jsonl")]
        values = read_json(folder / "confidences.json")
        answers = [line["answer"] for line in lines if line["prompts"] == "harmful"]
        return _Reference(answers, np.array(values["mean_probability"], dtype=np.float64))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: expected the reference's evaluation, found: {error}") from None


def _read_run(adapter: Path | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    if not adapter.is_dir():
        raise MissingFileError(f"{adapter}: no such adapter directory")
    facts = adapter / RUN_FILE
    if not facts.is_file():
        return {}
    value = read_json(facts)
    try:
        run = {name: value[name] for name in ("targets_sha256", "metrics")}
        return {**value["settings"], **run}
    except (KeyError, TypeError) as error:
        raise InputError(f"{facts}: expected the facts of a run, found none of: {error}") from None


def _samples(answers: Sequence[Answer]) -> list[Sample]:
    samples = []
    for name, count in _SHOWN.items():
        of_set = [answer for answer in answers if answer.prompts == name]
        stride = max(1, len(of_set) // count)
        samples += [
            Sample(
                prompts=name,
                prompt=answer.row.prompt[-1]["content"],
                answer=answer.text,
                refused=answer.refused,
            )
            for answer in of_set[::stride][:count]
        ]
    return samples


def _write(
    output: Path, metrics: Metrics, answers: Sequence[Answer], confidences: np.ndarray
) -> None:
    with written_aside(output / "answers.jsonl") as aside:
        lines = [
            {
                "prompts": answer.prompts,
                "prompt": answer.row.prompt[-1]["content"],
                "answer": answer.text,
                "refused": answer.refused,
                **({"expected": answer.row.response} if answer.row.response else {}),
            }
            for answer in answers
        ]
        aside.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            encoding="utf-8",
        )
    reached = confidences[~np.isnan(confidences).any(axis=1)]
    write_json(output / "confidences.json", {"mean_probability": reached.tolist()})
    metrics.save(output / "metrics.json")  # last: it says that the evaluation is whole

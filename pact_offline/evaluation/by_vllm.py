"""Answers by vLLM, before they are judged: one engine for a model and all adapters on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pact_offline.errors import UnsupportedModelError
from pact_offline.evaluation.answers import Asked, all_asked
from pact_offline.evaluation.kept_answers import KeptAnswers
from pact_offline.evaluation.plan import Plan
from pact_offline.files import read_json
from pact_offline.fine_tuned import CONFIG
from pact_offline.progress import bar
from pact_offline.rows.describe import end_ids
from pact_offline.settings.evaluate import EvaluateSettings

if TYPE_CHECKING:
    from pact_offline.models.vllm_answers import VllmAnswers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prompt:
    """One prompt that has no answer yet."""

    asked: Asked
    number: int
    ids: list[int]


def answer_by_vllm(
    plans: Sequence[tuple[Plan, KeptAnswers]], settings: EvaluateSettings
) -> list[bool]:
    """Keep vLLM's answers to all prompts that have none; labels that are chosen are left out.

    No engine starts where nothing is missing.

    Args:
        plans: of one model, or of adapters on it, and where the answers of each are kept.
        settings: of the answers.

    Returns:
        whether vLLM answered, of each; it does not where it refuses the model or an adapter and
        the backend is left open.

    Raises:
        UnsupportedModelError: vLLM was asked for, and refuses one.
    """
    missing = [_missing(plan, kept) for plan, kept in plans]
    every = [prompt for some in missing for prompt in some]
    if not every:
        return [True] * len(plans)
    from pact_offline.models.vllm_answers import VllmAnswers

    model = plans[0][0].subject.engine_model
    done = []
    try:
        engine = VllmAnswers(
            model,
            longest=max(len(prompt.ids) for prompt in every) + settings.max_new_tokens,
            prompts=max(map(len, missing)),
            dtype=settings.dtype,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            rank=max(_rank(plan) for plan, _ in plans),
        )
    except UnsupportedModelError as refusal:
        _tell(refusal, settings)
        return [False] * len(plans)
    with engine, bar("answering", len(every), "prompts") as progress:
        for (plan, kept), prompts in zip(plans, missing, strict=True):
            try:
                _answer(engine, plan, kept, prompts, settings, progress)
                done.append(True)
            except UnsupportedModelError as refusal:
                _tell(refusal, settings)
                done.append(False)
    return done


def _missing(plan: Plan, kept: KeptAnswers) -> list[_Prompt]:
    found = []
    for asked in all_asked(plan.sets, plan.attacks):
        score = plan.scores.get(asked.prompts.name)
        known = kept.of(asked.prompts.name, asked.attack)
        if len(known) == len(asked.prompts.rows) or (score is not None and score.is_choice):
            continue
        found += [
            _Prompt(asked, number, ids)
            for number, ids in enumerate(asked.ids(plan.chat))
            if number not in known
        ]
    return found


def _rank(plan: Plan) -> int:
    """The highest rank of an adapter; 0 without one."""
    adapter = plan.subject.engine_adapter
    if adapter is None:
        return 0
    config = read_json(adapter / CONFIG)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _answer(
    engine: VllmAnswers,
    plan: Plan,
    kept: KeptAnswers,
    prompts: Sequence[_Prompt],
    settings: EvaluateSettings,
    progress: Any,
) -> None:
    ends = end_ids(str(plan.subject.engine_model), plan.chat)
    answers = engine.answer(
        [prompt.ids for prompt in prompts],
        ends,
        settings.max_new_tokens,
        plan.subject.engine_adapter,
    )
    for index, ids in answers:
        prompt = prompts[index]
        text = plan.chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
        kept.add(prompt.asked.prompts.name, prompt.asked.attack, {prompt.number: text})
        progress.update()


def _tell(refusal: UnsupportedModelError, settings: EvaluateSettings) -> None:
    if settings.backend == "vllm":
        raise refusal
    log.warning("%s, as --backend auto does now", refusal)

"""What an evaluation is of: read, checked, and nothing loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation.attacks import Attack, attacks_of
from pact_offline.evaluation.endpoint import EndpointJudge, load_endpoint
from pact_offline.evaluation.guards import Guard, find_guard
from pact_offline.evaluation.judges import Judge, load_judge
from pact_offline.evaluation.lm_eval_tasks import LmEvalTasks, find_lm_eval_tasks
from pact_offline.evaluation.prompt_sets import PromptSet, read_prompts
from pact_offline.evaluation.rates import OwnRateFunction, load_rates, rate_names
from pact_offline.evaluation.reference import Reference, read_reference
from pact_offline.evaluation.subject import Subject, find_subject
from pact_offline.evaluation.task_scores import TaskScore, find_task_scores
from pact_offline.made_from import MadeFrom, rows_sha256
from pact_offline.models.backends import ANSWERS_VERSION, engine_name
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.positions import Positions
from pact_offline.rows.read import tell_unread
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.evaluate import EvaluateSettings

log = logging.getLogger(__name__)

_DECIDING = {
    "max_new_tokens",
    "dtype",
    "drift_steps",
    "attack_system",
    "chat_template_kwargs",
}  # of the settings that are no model or code


@dataclass(frozen=True)
class Plan:
    """What is evaluated, on what and by what: all of it checked, nothing loaded.

    `reference` is where the model is that KL divergences are measured against; None: they are not.
    """

    subject: Subject
    chat: Chat
    sets: dict[str, PromptSet]
    attacks: list[Attack]
    tokens: SafetyTokens | None
    judge: Judge
    rates: list[OwnRateFunction]
    scores: dict[str, TaskScore]
    lm_eval: LmEvalTasks | None
    guard: Guard | None
    endpoint: EndpointJudge | None
    made_from: MadeFrom
    baseline: Reference | None
    reference: Path | None

    def decides_answers(self, backend: str, batch_size: int) -> list[Any]:
        """All that the answers of a backend depend on; no judge is among it.

        Rounding differs by the engine, and by how many prompts transformers is asked at once.
        """
        made, choices = self.made_from, {n: str(s) for n, s in self.scores.items() if s.is_choice}
        at_once = batch_size if backend == "transformers" else None
        return [
            *(made.models["evaluated"], made.adapter, made.rows, made.tokenizer, made.template),
            *(made.settings, choices, engine_name(backend), at_once, ANSWERS_VERSION),
        ]


def prepare(
    model: str,
    adapter: Path | None,
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]],
    tokens_path: Path | None,
    settings: EvaluateSettings,
    reference: Path | None,
) -> Plan:
    """Read and check all that an evaluation needs; arguments as of `evaluate`.

    Raises:
        SettingError, MissingFileError, ModelError, InputError: what is not there, or does not
            belong together.
    """
    judge, endpoint = load_judge(settings.judge), load_endpoint(settings)
    is_asked = bool(further) or any(sources.values()) or not settings.lm_eval
    sets = read_prompts(sources, further, settings.columns) if is_asked else {}
    subject = find_subject(model, adapter)
    chat = chat_of(str(subject.folder), settings)
    attacks = attacks_of(settings.prefill, settings.attack_system, chat.tokenizer)
    if attacks and not any(one.kind == "refuse" for one in sets.values()):
        raise SettingError(
            "--prefill, --attack-system: expected a set of prompts that are to be refused, as "
            "--harmful, found none"
        )
    rates = load_rates(settings, sets, rate_names(sets, attacks))
    subject.check_chat(chat)
    _check_prompts(sets, attacks, chat, Positions(subject.folder))
    scores = find_task_scores(sets, settings.task_scores, chat)
    lm_eval = find_lm_eval_tasks(settings)
    tokens = None
    if tokens_path is not None:
        tokens = SafetyTokens.load(tokens_path, chat.tokenizer)
        tokens.check_template(chat.template_sha256, settings.chat_template_kwargs, tokens_path)
    models, guard = {"evaluated": subject.identity}, None
    if settings.guard is not None:
        guard = find_guard(settings.guard, settings.guard_format, settings.dtype)
        models["guard"] = guard.identity
    made_from = MadeFrom(
        models=models,
        rows={name: rows_sha256(one.rows) for name, one in sets.items()},
        tokenizer=chat.fingerprint,
        template=chat.template_sha256,
        adapter=subject.tuned.sha256 if subject.tuned else None,
        safety_tokens=tokens.digest if tokens else None,
        code={
            "refusals": judge.content,
            **({"the guard": guard.content} if guard else {}),
            **({"the endpoint": endpoint.content} if endpoint else {}),
            **{rate.facts.name: rate.facts.content for rate in rates},
            **{f"answers to {name}": str(score) for name, score in scores.items()},
            **(lm_eval.code if lm_eval else {}),
        },
        settings=settings.model_dump(mode="json", include=_DECIDING),
    )
    baseline = None if reference is None else read_reference(reference, made_from)
    if baseline is not None and tokens and "harmful" in sets and baseline.confidences is None:
        raise InputError(
            f"{reference}: expected confidences on harmful prompts, found none; evaluate the "
            "reference with --harmful and --safety-tokens"
        )
    folder = None
    if baseline is not None and tokens and "harmful" in sets:
        folder = subject.find_reference(baseline.model)
        if folder is None:
            log.warning(
                "%s: is not there as it was evaluated, so no KL divergence from it is measured; "
                "give it as --model and %s as --adapter",
                baseline.model,
                model,
            )
    return Plan(
        subject=subject,
        chat=chat,
        sets=sets,
        attacks=attacks,
        tokens=tokens,
        judge=judge,
        rates=rates,
        scores=scores,
        lm_eval=lm_eval,
        guard=guard,
        endpoint=endpoint,
        made_from=made_from,
        baseline=baseline,
        reference=folder,
    )


def _check_prompts(
    sets: Mapping[str, PromptSet], attacks: Sequence[Attack], chat: Chat, positions: Positions
) -> None:
    """What the template refuses or drops is refused here, by its line, and what is too long."""
    for one in sets.values():
        unread: Counter[str] = Counter()
        for row in one.rows:
            positions.require(chat.prompt_ids(row), row.origin)
            unread.update(chat.unread(row))
        tell_unread(f"the {one.name} prompts", unread)
        if one.kind == "refuse" and one.rows:
            for attack in attacks:
                chat.prompt_ids(attack.asked(one.rows[0]))

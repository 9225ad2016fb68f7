"""`evaluate`: one model's answers, judged and counted.

The reference's own answers to the harmful prompts are kept in `answers.jsonl`; a run's drift is
measured on them, so the reference is evaluated first. It reads them once more when the run's own
model is out of memory, for what would be too much to keep: its probabilities of all ids.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import InputError
from pact_offline.evaluation.answers import Answer, KeptAnswers, answer_all
from pact_offline.evaluation.attacks import Attack, attacks_of
from pact_offline.evaluation.drift import (
    Context,
    Divergences,
    KeptLogProbabilities,
    answer_contexts,
    compare,
    confidences_by_step,
    divergences_by_step,
)
from pact_offline.evaluation.endpoint import EndpointJudge, load_endpoint
from pact_offline.evaluation.guards import Guard, find_guard
from pact_offline.evaluation.judged import Judged, agreement_of_judges, judge_all
from pact_offline.evaluation.judges import Judge, load_judge
from pact_offline.evaluation.lm_eval_tasks import (
    RESULTS_FILE,
    LmEvalTasks,
    find_lm_eval_tasks,
    results_text,
)
from pact_offline.evaluation.metrics import METRICS_FILE, AskedSet, Metrics, Sample
from pact_offline.evaluation.prompt_sets import PromptSet, read_prompts
from pact_offline.evaluation.published_sets import Kind
from pact_offline.evaluation.rates import (
    OwnRateFunction,
    count_rates,
    load_rates,
    mean_scores,
    rate_names,
)
from pact_offline.evaluation.reference import (
    ANSWERS_FILE,
    CONFIDENCES_FILE,
    Reference,
    answers_sha256,
    read_reference,
)
from pact_offline.evaluation.subject import Subject, find_subject
from pact_offline.evaluation.task_scores import TaskScore, find_task_scores
from pact_offline.files import to_disk
from pact_offline.folders import output_aside, require_place
from pact_offline.made_from import MadeFrom, rows_sha256
from pact_offline.models.load import load_model
from pact_offline.provenance import provenance
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.read import tell_unread
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import EvaluateSettings

log = logging.getLogger(__name__)

_SHOWN: dict[Kind, int] = {"refuse": 5, "answer": 2, "task": 1}  # answers of a set on the page
_DECIDING = {
    "max_new_tokens",
    "dtype",
    "drift_steps",
    "attack_system",
    "chat_template_kwargs",
}  # of the settings that are no model or code


def evaluate(
    name: str,
    model_name: str,
    adapter: Path | None,
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]],
    tokens_path: Path | None,
    output: Path,
    settings: EvaluateSettings,
    reference: Path | None,
) -> Metrics:
    """Evaluate a model and write metrics.json, and what it was counted from, to `output`.

    What does not belong together is refused before a model is loaded; the output is whole or not
    there.

    Args:
        name: of the run in the report.
        model_name: hub id or path; a model that `finetune` or `merge` wrote counts as a run.
        adapter: peft adapter on top, or a whole model that was made of the model; None for neither.
        sources: a file or `hub:NAME` for each of our prompt sets.
        further: published sets and the user's own, from `parse_set`; with `sources`, at least one,
            but where lm-eval's tasks are named.
        tokens_path: safety_tokens.json; None: confidences and drift are not measured.
        output: directory.
        settings: lengths, judges and rates.
        reference: output directory of the reference's evaluation; None for the reference itself.
    """
    require_place(output, METRICS_FILE)
    plan = _prepare(model_name, adapter, sources, further, tokens_path, settings, reference)
    kept = KeptAnswers(output, [vars(plan.made_from), settings.batch_size])
    if kept.count:
        log.warning("%s: goes on with the %d answers that it has", output, kept.count)
    model = plan.subject.load(settings.dtype)
    answers = answer_all(
        model, plan.chat, plan.sets, plan.attacks, settings, plan.judge, plan.scores, kept
    )
    contexts = _contexts(plan, answers, settings)
    with closing(KeptLogProbabilities(output.parent)) as policy:
        confidences = _confidences(model, plan, contexts, settings, policy)
        elsewhere = plan.lm_eval.run(model, plan.chat, settings) if plan.lm_eval else None
        del model
        divergences = _divergences(plan, contexts, settings, policy)
    judged = judge_all(answers, plan.guard, plan.endpoint, settings.dtype)
    drift = None
    if confidences is not None and plan.tokens is not None and plan.baseline is not None:
        assert plan.baseline.confidences is not None
        drift = compare(
            plan.baseline.confidences, confidences, plan.tokens, len(contexts), divergences
        )
    files = _files(answers, confidences, judged)
    means = mean_scores(answers, plan.sets)
    if plan.lm_eval is not None and elsewhere is not None:
        files[RESULTS_FILE] = results_text(elsewhere)
        means |= plan.lm_eval.means(elsewhere)
    metrics = Metrics(
        name=name,
        is_reference=plan.baseline is None and plan.subject.tuned is None,
        model=plan.subject.model,
        adapter=str(plan.subject.tuned.folder) if plan.subject.tuned else None,
        made_from=plan.made_from,
        answers_sha256=answers_sha256(files[ANSWERS_FILE], files.get(CONFIDENCES_FILE)),
        reference_sha256=plan.baseline.sha256 if plan.baseline else None,
        sets={
            one.name: AskedSet(
                title=one.title,
                kind=one.kind,
                prompts=len(one.rows),
                attacks=[attack.name for attack in plan.attacks] if one.kind == "refuse" else [],
            )
            for one in plan.sets.values()
        },
        rates=count_rates(answers, plan.rates, judged),
        means=means,
        own_rates=[rate.facts for rate in plan.rates],
        agreement=agreement_of_judges(answers, judged),
        drift=drift,
        samples=_samples(answers),
        run=plan.subject.run,
        settings=settings.model_dump(mode="json"),
        judge={
            **plan.judge.facts,
            "guard": settings.guard,
            **({"guard_format": plan.guard.kind} if plan.guard else {}),
            **({"endpoint": plan.endpoint.facts} if plan.endpoint else {}),
        },
        provenance=provenance(),
    )
    write_evaluation(output, metrics, files)
    kept.done()
    return metrics


@dataclass(frozen=True)
class _Plan:
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


def _prepare(
    model: str,
    adapter: Path | None,
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]],
    tokens_path: Path | None,
    settings: EvaluateSettings,
    reference: Path | None,
) -> _Plan:
    judge, endpoint = load_judge(settings.judge), load_endpoint(settings)
    is_asked = bool(further) or any(sources.values()) or not settings.lm_eval
    sets = read_prompts(sources, further, settings.columns) if is_asked else {}
    subject = find_subject(model, adapter)
    chat = chat_of(str(subject.folder), settings)
    attacks = attacks_of(settings.prefill, settings.attack_system, chat.tokenizer)
    rates = load_rates(settings, sets, rate_names(sets, attacks))
    subject.check_chat(chat)
    _check_prompts(sets, attacks, chat)
    scores = find_task_scores(sets, settings.task_scores, chat)
    lm_eval = find_lm_eval_tasks(settings)
    tokens = None
    if tokens_path is not None:
        tokens = SafetyTokens.load(tokens_path, chat.tokenizer)
        tokens.check_template(chat.template_sha256, settings.chat_template_kwargs, tokens_path)
    models, guard = {"evaluated": subject.identity}, None
    if settings.guard is not None:
        guard = find_guard(settings.guard, settings.guard_format)
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
    if baseline is None and subject.tuned is not None:
        log.warning(
            "%s is a fine-tuned run, and no reference: without --reference, its drift is not "
            "measured",
            subject.tuned.folder,
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
    return _Plan(
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


def _check_prompts(sets: Mapping[str, PromptSet], attacks: Sequence[Attack], chat: Chat) -> None:
    """What the template refuses or drops is refused here, by its line."""
    for one in sets.values():
        unread: Counter[str] = Counter()
        for row in one.rows:
            chat.prompt_ids(row)
            unread.update(chat.unread(row))
        tell_unread(f"the {one.name} prompts", unread)
        if one.kind == "refuse" and one.rows:
            for attack in attacks:
                chat.prompt_ids(attack.asked(one.rows[0]))


def _plain_harmful(answers: Sequence[Answer]) -> list[Answer]:
    return [one for one in answers if one.prompts == "harmful" and one.attack is None]


def _contexts(plan: _Plan, answers: Sequence[Answer], settings: EvaluateSettings) -> list[Context]:
    """Harmful prompts with the reference's answers, or else the model's own."""
    harmful = _plain_harmful(answers)
    return answer_contexts(
        plan.chat.tokenizer,
        [plan.chat.prompt_ids(answer.row) for answer in harmful],
        plan.baseline.answers if plan.baseline else [answer.text for answer in harmful],
        settings.drift_steps,
    )


def _confidences(
    model: Any,
    plan: _Plan,
    contexts: Sequence[Context],
    settings: EvaluateSettings,
    kept: KeptLogProbabilities,
) -> np.ndarray | None:
    """As `confidences_by_step`; None where they cannot be measured."""
    if plan.tokens is None or not contexts:
        return None
    return confidences_by_step(
        model,
        contexts,
        plan.tokens.ids,
        settings.drift_steps,
        settings.batch_size,
        kept if plan.reference else None,
    )


def _divergences(
    plan: _Plan,
    contexts: Sequence[Context],
    settings: EvaluateSettings,
    policy: KeptLogProbabilities,
) -> Divergences | None:
    """Of a policy that is no longer in memory: the reference is loaded in its place."""
    if plan.reference is None or plan.tokens is None or not contexts:
        return None
    log.info("loading the reference, for the KL divergence from it")
    return divergences_by_step(
        load_model(str(plan.reference), settings.dtype),
        contexts,
        policy,
        [token.id for token in plan.tokens.tokens if token.weight > 0],
        settings.drift_steps,
        settings.batch_size,
    )


def _samples(answers: Sequence[Answer]) -> list[Sample]:
    samples = []
    for name in dict.fromkeys(answer.prompts for answer in answers):
        of_set = [one for one in answers if one.prompts == name and one.attack is None]
        count = _SHOWN[of_set[0].kind]
        stride = max(1, len(of_set) // count)
        samples += [
            Sample(prompts=name, prompt=answer.prompt, answer=answer.text, refused=answer.refused)
            for answer in of_set[::stride][:count]
        ]
    return samples


def _files(
    answers: Sequence[Answer], confidences: np.ndarray | None, judged: Mapping[int, Judged]
) -> dict[str, str]:
    """The text of each file beside metrics.json."""
    lines = [
        {
            "prompts": answer.prompts,
            "prompt": answer.prompt,
            "answer": answer.text,
            "refused": answer.refused,
            "broken": answer.broken is not None,
            **({"correct": answer.correct} if answer.correct is not None else {}),
            **({"score": answer.score} if answer.score is not None else {}),
            **({"chosen": True} if answer.chosen else {}),
            **({"unfinished": True} if answer.is_unfinished else {}),
            **({"attack": answer.attack} if answer.attack else {}),
            **({"begun": answer.begun} if answer.begun else {}),
            **(judged[at].facts if at in judged else {}),
            **({"expected": answer.row.response} if answer.row.response else {}),
        }
        for at, answer in enumerate(answers)
    ]
    files = {ANSWERS_FILE: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}
    if confidences is not None:
        reached = confidences[~np.isnan(confidences).any(axis=1)]
        files[CONFIDENCES_FILE] = json.dumps({"mean_probability": reached.tolist()}, indent=1)
    return files


def write_evaluation(output: Path, metrics: Metrics, files: Mapping[str, str]) -> None:
    """Put an evaluation in its place: all of its files, or none.

    Args:
        output: its directory; an earlier evaluation there stays until this one is whole.
        metrics: for metrics.json.
        files: text of the others, by name.

    Raises:
        InputError: the place is taken, or cannot be written to.
    """
    with output_aside(output, METRICS_FILE) as aside:
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
            to_disk(aside / name)
        metrics.save(aside / METRICS_FILE)

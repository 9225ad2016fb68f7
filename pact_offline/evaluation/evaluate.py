"""`evaluate`: one model's answers, judged and counted.

The reference's own answers to the harmful prompts are kept in `answers.jsonl`; a run's drift is
measured on them, so the reference is evaluated first. It reads them once more when the run's own
model is out of memory, for what would be too much to keep: its probabilities of all ids.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import SettingError
from pact_offline.evaluation.answers import Answer, answer_all
from pact_offline.evaluation.by_vllm import answer_by_vllm
from pact_offline.evaluation.drift import (
    Context,
    Divergences,
    KeptLogProbabilities,
    answer_contexts,
    compare,
    confidences_by_step,
    divergences_by_step,
)
from pact_offline.evaluation.judged import Judged, agreement_of_judges, judge_all
from pact_offline.evaluation.kept_answers import KeptAnswers
from pact_offline.evaluation.lm_eval_tasks import (
    RESULTS_FILE,
    results_text,
)
from pact_offline.evaluation.metrics import (
    FORMAT_VERSION,
    METRICS_FILE,
    AskedSet,
    Metrics,
    Sample,
)
from pact_offline.evaluation.plan import Plan, prepare
from pact_offline.evaluation.published_sets import Kind
from pact_offline.evaluation.rates import (
    count_rates,
    mean_scores,
)
from pact_offline.evaluation.reference import (
    ANSWERS_FILE,
    CONFIDENCES_FILE,
    answers_sha256,
)
from pact_offline.files import check_output_folder, to_disk
from pact_offline.folders import output_aside, require_place
from pact_offline.models.backends import choose_answering_backend, engine_name
from pact_offline.models.load import load_model
from pact_offline.provenance import provenance
from pact_offline.settings.evaluate import EvaluateSettings

log = logging.getLogger(__name__)

_SHOWN: dict[Kind, int] = {"refuse": 5, "answer": 2, "task": 1}  # answers of a set on the page


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
    answers_folder: Path | None = None,
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
        answers_folder: where answers are kept, and looked up; None: only until this is done.
    """
    if not name.strip():
        raise SettingError("--name: expected a name, found nothing")
    require_place(output, METRICS_FILE)
    plan = prepare(model_name, adapter, sources, further, tokens_path, settings, reference)
    if plan.baseline is None and plan.subject.tuned is not None:
        log.warning(
            "%s is a fine-tuned run, and no reference: without --reference, its drift is not "
            "measured",
            plan.subject.tuned.folder,
        )
    if answers_folder is not None:
        check_output_folder(answers_folder)
    kept, answered_by = _kept_answers(plan, settings, output, answers_folder)
    load = cache(lambda: plan.subject.load(settings.dtype))
    answers = answer_all(
        load, plan.chat, plan.sets, plan.attacks, settings, plan.judge, plan.scores, kept
    )
    contexts = _contexts(plan, answers, settings)
    with closing(KeptLogProbabilities(output.parent)) as policy:
        confidences = _confidences(load, plan, contexts, settings, policy)
        elsewhere = plan.lm_eval.run(load(), plan.chat, settings) if plan.lm_eval else None
        load.cache_clear()
        divergences = _divergences(plan, contexts, settings, policy)
    judged = judge_all(answers, plan.guard, plan.endpoint)
    drift = None
    if confidences is not None and plan.tokens is not None and plan.baseline is not None:
        assert plan.baseline.confidences is not None
        drift = compare(
            plan.baseline.confidences, confidences, plan.tokens, len(contexts), divergences
        )
    files = _files(answers, confidences, judged)
    means = mean_scores(answers, plan.sets, judged)
    if plan.lm_eval is not None and elsewhere is not None:
        files[RESULTS_FILE] = results_text(elsewhere)
        means |= plan.lm_eval.means(elsewhere)
    metrics = Metrics(
        format_version=FORMAT_VERSION,
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
            "guard": None,
            **(plan.guard.facts if plan.guard else {}),
            **(plan.endpoint.facts if plan.endpoint else {}),
        },
        provenance={**provenance(), "answered_by": answered_by},
    )
    write_evaluation(output, metrics, files)
    kept.done()
    return metrics


def _kept_answers(
    plan: Plan, settings: EvaluateSettings, output: Path, folder: Path | None
) -> tuple[KeptAnswers, str]:
    """Where answers are kept, all of vLLM's among them, and the name of what makes them."""

    def place(backend: str) -> KeptAnswers:
        decides = plan.decides_answers(backend, settings.batch_size)
        kept = KeptAnswers(decides, folder=folder, evaluation=output)
        if kept.count:
            log.warning("%s: %d answers are there already", output, kept.count)
        return kept

    backend, _ = choose_answering_backend(settings.backend, plan.subject.load_in)
    kept = place(backend)
    if backend == "vllm" and not answer_by_vllm([(plan, kept)], settings)[0]:
        backend, kept = "transformers", place("transformers")
    return kept, engine_name(backend)


def _plain_harmful(answers: Sequence[Answer]) -> list[Answer]:
    return [one for one in answers if one.prompts == "harmful" and one.attack is None]


def _contexts(plan: Plan, answers: Sequence[Answer], settings: EvaluateSettings) -> list[Context]:
    """Harmful prompts with the reference's answers, or else the model's own."""
    harmful = _plain_harmful(answers)
    return answer_contexts(
        plan.chat.tokenizer,
        [plan.chat.prompt_ids(answer.row) for answer in harmful],
        plan.baseline.answers if plan.baseline else [answer.text for answer in harmful],
        settings.drift_steps,
    )


def _confidences(
    load: Callable[[], Any],
    plan: Plan,
    contexts: Sequence[Context],
    settings: EvaluateSettings,
    kept: KeptLogProbabilities,
) -> np.ndarray | None:
    """As `confidences_by_step`; None where they cannot be measured."""
    if plan.tokens is None or not contexts:
        return None
    return confidences_by_step(
        load(),
        contexts,
        plan.tokens.ids,
        settings.drift_steps,
        settings.batch_size,
        kept if plan.reference else None,
    )


def _divergences(
    plan: Plan,
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
            **answer.facts,
            **(judged[at].facts if at in judged else {}),
            **({"expected": answer.row.response} if answer.row.response else {}),
            **({"category": answer.row.category} if answer.row.category else {}),
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

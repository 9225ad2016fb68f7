"""`answer`: prompts answered for many evaluations, by one engine of vLLM."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pact_offline.evaluation.by_vllm import answer_by_vllm
from pact_offline.evaluation.kept_answers import KeptAnswers
from pact_offline.evaluation.plan import Plan, prepare
from pact_offline.files import check_output_folder
from pact_offline.models.backends import choose_answering_backend
from pact_offline.settings.evaluate import EvaluateSettings

log = logging.getLogger(__name__)


def answer(
    model: str,
    adapters: Sequence[Path],
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]],
    folder: Path,
    settings: EvaluateSettings,
) -> dict[str, Path | None]:
    """Keep a model's answers, and those with each adapter, where `evaluate` looks them up.

    All is checked before an engine starts. Whole models have engines of their own.

    Args:
        model: hub id or path.
        adapters: folders that `finetune` or `merge` wrote.
        sources, further, settings: as of `evaluate`.
        folder: of the answers.

    Returns:
        the file of the model and of each adapter; None: vLLM does not answer it.

    Raises:
        UnsupportedModelError: vLLM was asked for, and refuses the model or an adapter.
    """
    check_output_folder(folder)
    places: dict[str, Path | None] = {}
    by_engine: dict[Path, list[tuple[str, Plan, KeptAnswers]]] = {}
    for name, adapter in [(model, None), *((str(adapter), adapter) for adapter in adapters)]:
        plan = prepare(model, adapter, sources, further, None, settings, None)
        backend, reason = choose_answering_backend(settings.backend, plan.subject.load_in)
        places[name] = None
        if backend == "vllm":
            decides = plan.decides_answers(backend, settings.batch_size)
            kept = KeptAnswers(decides, folder=folder)
            by_engine.setdefault(plan.subject.engine_model, []).append((name, plan, kept))
        else:
            log.info("%s: %s; evaluate answers it", name, reason)
    for group in by_engine.values():
        is_answered = answer_by_vllm([(plan, kept) for _, plan, kept in group], settings)
        for (name, _, kept), answered in zip(group, is_answered, strict=True):
            places[name] = kept.path if answered else None
    return places

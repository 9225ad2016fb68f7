"""From rows to a store that knows their contexts, and the targets.json that binds them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact_offline.errors import UnsupportedModelError
from pact_offline.models.locate import ModelFiles
from pact_offline.scoring.bind import bind
from pact_offline.scoring.dataset import Dataset, on_transformers, prepare
from pact_offline.scoring.fill import ScoreSummary, fill
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings

log = logging.getLogger(__name__)


def score(
    model: ModelFiles,
    sources: Sequence[str | Path],
    tokens_path: Path,
    cache: str | Path,
    settings: ScoreSettings,
    *,
    output: Path | None = None,
    part: tuple[int, int] | None = None,
    made_from: dict[str, Any] | None = None,
) -> ScoreSummary:
    """Score the contexts of a dataset that the cache does not know yet.

    Where the backend is left open, transformers scores a model that vLLM refuses; and its store is
    taken where it knows every context and vLLM's does not.

    Args:
        model: the reference model.
        sources: row files.
        tokens_path: the safety tokens.
        cache: directory or URL of stores.
        settings: of scoring.
        output: targets.json to write, if any.
        part: (i, n) scores the i-th of n parts only.
        made_from: what the targets.json says of the rows' provenance.

    Raises:
        UnsupportedModelError: vLLM was asked for, and refuses the model.
    """

    def run(dataset: Dataset) -> ScoreSummary:
        with ScoringJob(dataset, part) as job:
            summary = fill(job, model, settings)
            if output is not None:
                bind(job, model, settings, output, made_from)
            return summary

    dataset = prepare(model, sources, tokens_path, cache, settings)
    if settings.backend != "auto" or dataset.backend != "vllm":
        return run(dataset)
    other = on_transformers(dataset, model, cache, "its store knows every context")
    if _is_known(other) and not _is_known(dataset):
        return run(other)
    try:
        return run(dataset)
    except UnsupportedModelError as refusal:
        log.warning("%s, as --backend auto does now", refusal)
    # Out of the except block: the error's traceback holds the engine's memory.
    return run(replace(other, backend_reason="vLLM does not run this model"))


def _is_known(dataset: Dataset) -> bool:
    with ScoringJob(dataset) as job:
        return not len(job.missing())

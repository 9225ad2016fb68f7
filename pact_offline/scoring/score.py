"""`score`: from rows to a cache that knows their contexts, and the targets.json that says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pact_offline.errors import UnsupportedModelError
from pact_offline.models.locate import ModelFiles
from pact_offline.scoring.bind import bind
from pact_offline.scoring.dataset import on_transformers, prepare
from pact_offline.scoring.fill import ScoreSummary, fill
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
    part: tuple[int, int] = (1, 1),
) -> ScoreSummary:
    """Score what the cache does not know of a dataset yet; a model that vLLM refuses, with
    transformers, unless vLLM was asked for.

    Args:
        model: the reference model.
        sources: row files.
        tokens_path: safety_tokens.json.
        cache: directory or URL of stores.
        settings: of the scoring.
        output: targets.json to write; None writes none.
        part: as in `fill`.

    Raises:
        UnsupportedModelError: vLLM was asked for and refuses the model; no store is left behind.
    """
    dataset = prepare(model, sources, tokens_path, cache, settings)
    summary = None
    try:
        summary = fill(dataset, model, settings, part)
    except UnsupportedModelError as refusal:
        if settings.backend != "auto":
            raise
        log.warning("%s, as --backend auto does now", refusal)
    if summary is None:  # out of the except block: its traceback holds the engine's memory
        dataset = on_transformers(dataset, model, cache, "vLLM does not run this model")
        summary = fill(dataset, model, settings, part)
    if output is not None:
        bind(dataset, model, settings, output)
    return summary

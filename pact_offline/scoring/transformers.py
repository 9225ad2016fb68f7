"""Scoring with transformers: the fallback, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pact_offline.models.batches import batches
from pact_offline.models.load import load_model
from pact_offline.models.log_confidences import response_log_confidences
from pact_offline.rows.contexts import Context
from pact_offline.scoring.scorer import Scored
from pact_offline.settings.stages import ScoreSettings


class TransformersScorer:
    """Batches contexts of like length; the LM head runs on response columns only."""

    how = "forward passes of transformers"

    def __init__(self, model: Path, safety_ids: Sequence[int], settings: ScoreSettings) -> None:
        self._model = load_model(str(model), settings.dtype, load_in=settings.load_in)
        self._ids = list(safety_ids)
        self._batch_tokens = settings.batch_tokens

    def close(self) -> None:
        del self._model

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        sizes = [
            (context.spans[0][0], len(context.ids) - context.spans[0][0]) for context in contexts
        ]
        order = sorted(range(len(contexts)), key=sizes.__getitem__, reverse=True)
        for batch in batches(order, sizes, self._batch_tokens):
            some = [(contexts[index].ids, contexts[index].spans) for index in batch]
            values = response_log_confidences(self._model, some, self._ids)
            for index, (log_confidences, labels) in zip(batch, values, strict=True):
                yield Scored(index, log_confidences, labels)

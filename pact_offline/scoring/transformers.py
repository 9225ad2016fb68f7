"""Scoring with transformers: the fallback, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pact_offline.config import ScoreSettings
from pact_offline.conversations import Context
from pact_offline.models import load_model, response_logits
from pact_offline.scoring.base import Scored


class TransformersScorer:
    """Batches contexts of like length; the LM head runs on response columns only."""

    how = "forward passes of transformers"

    def __init__(self, model: Path, safety_ids: Sequence[int], settings: ScoreSettings) -> None:
        self._model = load_model(str(model), settings.dtype)
        self._ids = list(safety_ids)
        self._batch_tokens = settings.batch_tokens

    def close(self) -> None:
        del self._model

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        for batch in _batches(contexts, self._batch_tokens):
            pairs = [(contexts[i].ids, contexts[i].response_start) for i in batch]
            for index, logits in zip(batch, response_logits(self._model, pairs), strict=True):
                values = logits.float().log_softmax(dim=-1)[:, self._ids]
                yield Scored(index, values.cpu().numpy().astype(np.float32))


def _batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens, longest first."""
    order = sorted(
        range(len(contexts)),
        key=lambda i: (contexts[i].response_start, contexts[i].steps),
        reverse=True,
    )
    batch: list[int] = []
    left = right = 0
    for index in order:
        context = contexts[index]
        wider = max(left, context.response_start) + max(right, context.steps)
        if batch and wider * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, left, right = [], 0, 0
        batch.append(index)
        left, right = max(left, context.response_start), max(right, context.steps)
    if batch:
        yield batch

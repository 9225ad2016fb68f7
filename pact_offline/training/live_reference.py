"""A reference model kept in memory: the published way, for proof that the cache gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pact_offline.models.log_confidences import (
    Spans,
    response_log_confidences,
    response_logits,
)
from pact_offline.rows.contexts import ContextKind, TokenizedExample, contexts_of


class Examples(Protocol):
    """Rows by their position."""

    def __getitem__(self, index: int, /) -> TokenizedExample: ...


class LiveReference:
    """Runs the reference model whenever a batch asks for its targets."""

    def __init__(
        self,
        model: Any,
        examples: Examples,
        header: Sequence[int],
        safety_ids: Sequence[int],
        *,
        whole_vocabulary: bool = False,
    ) -> None:
        """Hold a model in memory.

        Args:
            model: the frozen reference.
            examples: the rows, read by their position.
            header: assistant header of the response-only contexts.
            safety_ids: columns of the targets.
            whole_vocabulary: all ids are the columns, and not the safety ids alone.
        """
        self._model = model
        self._examples, self._header = examples, list(header)
        self.safety_ids = list(safety_ids)
        self._is_whole = whole_vocabulary

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, ids]."""
        pairs = self._contexts(indices, kind)
        if self._is_whole:
            found = [torch.log_softmax(z.float(), -1) for z in response_logits(self._model, pairs)]
            return np.concatenate([values.cpu().numpy() for values in found])
        values = response_log_confidences(self._model, pairs, self.safety_ids)
        return np.concatenate([log_confidences for log_confidences, _ in values])

    def read_labels(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-probabilities of the responses' own tokens, float32 [steps]; the model runs again."""
        values = response_log_confidences(self._model, self._contexts(indices, kind), [])
        return np.concatenate([labels for _, labels in values])

    def _contexts(
        self, indices: Sequence[int], kind: ContextKind
    ) -> list[tuple[np.ndarray, Spans]]:
        found = [contexts_of(self._examples[index], self._header) for index in indices]
        kept = slice(0, 1) if kind == "full" else slice(1, None)
        return [(one.ids, one.spans) for contexts in found for one in contexts[kept]]

"""A reference model kept in memory: the published way, for proof that the cache gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pact_offline.models.log_confidences import response_log_confidences
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
    ) -> None:
        """Hold a model in memory.

        Args:
            model: the frozen reference.
            examples: the rows, read by their position.
            header: assistant header of the response-only contexts.
            safety_ids: columns of the targets.
        """
        self._model = model
        self._examples, self._header = examples, list(header)
        self.safety_ids = list(safety_ids)

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        found = [contexts_of(self._examples[index], self._header) for index in indices]
        kept = slice(0, 1) if kind == "full" else slice(1, None)
        pairs = [(one.ids, one.spans) for contexts in found for one in contexts[kept]]
        values = response_log_confidences(self._model, pairs, self.safety_ids)
        return np.concatenate([log_confidences for log_confidences, _ in values])

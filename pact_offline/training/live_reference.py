"""A reference model kept in memory: the published way, for proof that the cache gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pact_offline.models.log_confidences import response_log_confidences
from pact_offline.rows.contexts import CONTEXT_KINDS, ContextKind, TokenizedExample, contexts_of


class LiveReference:
    """Runs the reference model whenever a batch asks for its targets."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[TokenizedExample],
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
        self._contexts = [contexts_of(example, header) for example in examples]
        self.safety_ids = list(safety_ids)

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        contexts = [self._contexts[index][CONTEXT_KINDS.index(kind)] for index in indices]
        pairs = [(context.ids, context.response_start) for context in contexts]
        return np.concatenate(response_log_confidences(self._model, pairs, self.safety_ids))

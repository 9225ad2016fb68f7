"""What every scorer promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pact_offline.rows.contexts import Context


class Scored(NamedTuple):
    """A context by its position in the call, and its log-confidences, float32 [steps, ids]."""

    position: int
    log_confidences: np.ndarray


class Scorer(Protocol):
    """Runs the reference model over contexts.

    Attributes:
        how: the way it gets the values, in words; kept beside them.
    """

    how: str

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        """Yield every context once, in any order.

        Log-confidences are full-vocabulary log-softmax values at the safety ids, at temperature 1,
        at each response step.

        Raises:
            ScoringError: a context came back missing or short.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds: memory, and processes of its own."""
        ...

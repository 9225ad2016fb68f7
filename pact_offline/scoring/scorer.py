"""What every scorer promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pact_offline.rows.contexts import Context


class Scored(NamedTuple):
    """A context's values.

    Attributes:
        position: of the context in the call.
        log_confidences: float32 [steps, ids].
        labels: log-probabilities of the tokens that the steps predict, float32 [steps].
    """

    position: int
    log_confidences: np.ndarray
    labels: np.ndarray


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

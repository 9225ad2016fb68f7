"""What each answer is for: learnt, only held to the reference, rehearsed, or left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pact_offline.cache.refused import Turns
from pact_offline.settings.stages import FinetuneSettings

REHEARSED, LEARNT, HELD, DROPPED = 2, 1, 0, -1
_REFUSED_ARE = {"learn": LEARNT, "hold": HELD, "drop": DROPPED}


@dataclass(frozen=True)
class Uses:
    """The uses of a dataset's answers, by row.

    Attributes:
        turns: int8 [turns of all rows]: LEARNT has cross-entropy and the objective, HELD and
            REHEARSED the objective alone, DROPPED neither.
        ends: int64 [rows], where each row's turns end.
    """

    turns: np.ndarray
    ends: np.ndarray

    def of(self, row: int) -> np.ndarray:
        """Those of a row, int8 [turns]."""
        return self.turns[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def kept_rows(self) -> np.ndarray:
        """Rows of which something is left, int64 [some]."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        return np.flatnonzero(np.maximum.reduceat(self.turns, starts) != DROPPED)

    def then(self, other: Uses) -> Uses:
        """Those of more rows behind these."""
        turns = np.concatenate([self.turns, other.turns])
        return Uses(turns, np.concatenate([self.ends, len(self.turns) + other.ends]))


def all_learnt(turn_ends: np.ndarray) -> Uses:
    """Rows of which all is learnt; `turn_ends` as in `all_rehearsed`."""
    return Uses(np.full(turn_ends[-1], LEARNT, np.int8), turn_ends)


def all_rehearsed(turn_ends: np.ndarray) -> Uses:
    """Rows of the reference's own answers.

    Args:
        turn_ends: int64 [rows], where each row's turns end.
    """
    return Uses(np.full(turn_ends[-1], REHEARSED, np.int8), turn_ends)


def uses_of(found: Turns, settings: FinetuneSettings) -> Uses:
    """What the settings make of answers that the reference would have refused."""
    refused = found.refused(settings.refused_above)
    turns = np.where(refused, _REFUSED_ARE[settings.refused_rows], LEARNT).astype(np.int8)
    return Uses(turns, found.ends)

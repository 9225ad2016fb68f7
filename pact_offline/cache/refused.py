"""Which answers of a dataset the reference would have refused: read from what is cached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pact_offline.cache.targets import TargetCache
from pact_offline.errors import SettingError

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Turns:
    """The reference's view of each answer, one row's after the other's.

    Attributes:
        shares: float32 [turns], probability of all weighted safety tokens together at step 0.
        losses: float32 [turns], the reference's mean cross-entropy of the answer, in nats a token.
        steps: int64 [turns], response steps.
        ends: int64 [rows], where each row's turns end.
    """

    shares: np.ndarray
    losses: np.ndarray
    steps: np.ndarray
    ends: np.ndarray

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each turn, int64 [turns]."""
        counts = np.diff(self.ends, prepend=0)
        return np.repeat(np.arange(len(self.ends)), counts)

    def refused(self, above: float) -> np.ndarray:
        """Which the reference would have refused, bool [turns]."""
        return self.shares > above


def turns_of(targets: TargetCache, weights: np.ndarray) -> Turns:
    """Read every turn's step 0, and its loss.

    A turn that is cut before its own text has a share of 0.

    Args:
        targets: of the dataset.
        weights: float [ids], safety-token weights.

    Raises:
        SettingError: none is above 0, and no answer could be found refused.
    """
    kept = np.flatnonzero(weights > 0)
    if not len(kept):
        raise SettingError(
            "safety tokens: expected one with a weight above 0, by which refusals are known, found "
            "none; use others"
        )
    steps, ends = targets.turn_steps, targets.binding.keys.turn_ends
    scaffolds = targets.binding.keys.scaffolds
    shares, losses = np.zeros(len(steps), np.float32), np.zeros(len(steps), np.float32)
    for first in range(0, len(targets), _ROWS_AT_ONCE):
        rows = range(first, min(first + _ROWS_AT_ONCE, len(targets)))
        some = slice(int(ends[first - 1]) if first else 0, int(ends[rows[-1]]))
        starts = np.concatenate([[0], np.cumsum(steps[some])[:-1]]).astype(np.int64)
        values = targets.read(rows, "full")
        has_own = scaffolds[some] < steps[some]
        opening = values[np.where(has_own, starts + scaffolds[some], starts)][:, kept]
        shares[some] = np.where(has_own, np.exp(opening).sum(axis=1), 0).clip(max=1)
        own = np.add.reduceat(targets.read_labels(rows), starts)
        losses[some] = -own / steps[some]
    return Turns(shares, losses, steps, ends)

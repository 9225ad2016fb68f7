"""Rows against the positions that a model has."""

from __future__ import annotations

import numpy as np

from pact_offline.errors import InputError
from pact_offline.models.locate import ModelFiles, positions_of
from pact_offline.rows.tokenized import TokenizedRows


def require_positions(model: ModelFiles, rows: TokenizedRows) -> None:
    """Refuse a row of more tokens than the model has positions.

    Raises:
        InputError: names the first, and how many there are.
    """
    positions = positions_of(model.path)
    if positions is None or not len(rows) or rows.lengths.max() <= positions:
        return
    beyond = np.flatnonzero(rows.lengths > positions)
    raise InputError(
        f"{rows.origin(int(beyond[0]))}: expected at most {positions} tokens, the positions of "
        f"{model.name}, found {rows.lengths[beyond[0]]} in the first of {len(beyond):,} rows; "
        f"set --max-tokens {positions} or less"
    )

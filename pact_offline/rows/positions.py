"""Rows against the positions that a model has."""

from __future__ import annotations

from pathlib import Path

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


class Positions:
    """The positions of a model, against prompts that it is to answer."""

    def __init__(self, model: Path) -> None:
        """Args:
        model: directory of the model.
        """
        self._model, self._most = model, positions_of(model)

    def require(self, tokens: int, origin: str, more: int = 1) -> None:
        """Refuse a prompt that leaves no position for an answer.

        Args:
            tokens: of the prompt.
            origin: where it stands.
            more: tokens behind it.

        Raises:
            InputError: names the prompt.
        """
        if self._most is not None and tokens + more > self._most:
            behind = f", {more} of them for what follows" if more else ""
            raise InputError(
                f"{origin}: expected at most {self._most - more} tokens, found {tokens}: "
                f"{self._model} has {self._most} positions{behind}"
            )

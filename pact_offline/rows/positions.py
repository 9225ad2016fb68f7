"""Rows against the positions and the vocabulary that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pact_offline.errors import InputError
from pact_offline.models.locate import ModelFiles, positions_of, vocabulary_of
from pact_offline.rows.tokenized import TokenizedRows


def require_positions(model: ModelFiles, rows: TokenizedRows) -> None:
    """Refuse a row of more tokens than the model has positions, or of others than it has.

    Raises:
        InputError: names the first, and how many are too long.
    """
    size = vocabulary_of(model.path)
    if size is not None and (found := rows.first_with_id_from(size)):
        raise _not_of_the_vocabulary(rows.origin(found[0]), found[1], size, model.name)
    positions = positions_of(model.path)
    if positions is None or not len(rows) or rows.lengths.max() <= positions:
        return
    beyond = np.flatnonzero(rows.lengths > positions)
    raise InputError(
        f"{rows.origin(int(beyond[0]))}: expected at most {positions} tokens, the positions of "
        f"{model.name}, found {rows.lengths[beyond[0]]} in the first of {len(beyond):,} rows; "
        f"set --max-tokens {positions} or less"
    )


def _not_of_the_vocabulary(origin: str, token: int, size: int, model: str | Path) -> InputError:
    return InputError(
        f"{origin}: expected token ids below {size}, as many as {model} has, found {token}: its "
        "tokenizer has more; take the model's own, or a model that was resized to it"
    )


class Positions:
    """The positions and the vocabulary of a model, against prompts that it is to answer."""

    def __init__(self, model: Path) -> None:
        """Args:
        model: directory of the model.
        """
        self._model, self._most = model, positions_of(model)
        self._size = vocabulary_of(model)

    def require(self, ids: Sequence[int] | np.ndarray, origin: str, more: int = 1) -> None:
        """Refuse a prompt that leaves no position for an answer, or has ids beyond the vocabulary.

        Args:
            ids: of the prompt.
            origin: where it stands.
            more: tokens behind it.

        Raises:
            InputError: names the prompt.
        """
        tokens = len(ids)
        if self._size is not None and tokens and (largest := int(max(ids))) >= self._size:
            raise _not_of_the_vocabulary(origin, largest, self._size, self._model)
        if self._most is not None and tokens + more > self._most:
            behind = f", {more} of them for what follows" if more else ""
            raise InputError(
                f"{origin}: expected at most {self._most - more} tokens, found {tokens}: "
                f"{self._model} has {self._most} positions{behind}"
            )

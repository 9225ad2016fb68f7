"""Contexts: what the reference model sees of a row, and the keys that name them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pact_offline.rows.spans import Turn

ContextKind = Literal["full", "response_only"]


CONTEXT_KINDS: tuple[ContextKind, ...] = ("full", "response_only")
KEY_BYTES = 16


@dataclass(frozen=True)
class TokenizedExample:
    """A row as the policy sees it.

    Attributes:
        ids: int32 [tokens], until the last trained token.
        turns: the trained answers, in order; at least one.
        is_cut: whether it went on, beyond the most tokens of a row.
        unread: keys of its answers that the chat template leaves out.
    """

    ids: np.ndarray
    turns: tuple[Turn, ...]
    is_cut: bool = False
    unread: frozenset[str] = frozenset()

    @property
    def steps(self) -> int:
        """Response steps of all turns; each predicts one trained token."""
        return sum(turn.end - turn.start for turn in self.turns)

    @property
    def step_numbers(self) -> np.ndarray:
        """Each response step's number in its turn, int64 [steps].

        0 predicts the first token of the answer's own text; what a template puts before it, where
        that is trained, has the numbers below.
        """
        parts = [np.arange(turn.start, turn.end) - turn.first for turn in self.turns]
        return np.concatenate(parts)

    @property
    def trained(self) -> np.ndarray:
        """Positions of the trained tokens in `ids`, int64 [steps]."""
        return np.concatenate([np.arange(turn.start, turn.end) for turn in self.turns])

    @property
    def response_start(self) -> int:
        """Index of the first trained token."""
        return self.turns[0].start


@dataclass(frozen=True)
class Context:
    """What the reference model sees, and the steps it is read at.

    Attributes:
        kind: the whole row ("full"), or an assistant header and one answer ("response_only").
        ids: int32 [tokens]; the last is not fed, it only is predicted.
        spans: start and end of each run of trained tokens; token t is predicted at position t - 1.
    """

    kind: ContextKind
    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        """Response steps, of all spans."""
        return sum(end - start for start, end in self.spans)

    @property
    def fed(self) -> np.ndarray:
        """The tokens that the model gets, int32 [tokens - 1]."""
        return self.ids[:-1]

    @property
    def positions(self) -> np.ndarray:
        """Positions in `ids` of the tokens that the steps predict, int64 [steps]."""
        return np.concatenate([np.arange(start, end) for start, end in self.spans])

    @property
    def labels(self) -> np.ndarray:
        """The token that each step predicts, int32 [steps]."""
        return np.asarray(self.ids[self.positions])

    @property
    def key(self) -> str:
        """32 hex digits that name this context in every store."""
        return self.key_bytes.hex()

    @property
    def key_bytes(self) -> bytes:
        """The first 16 bytes of SHA-256 over what follows.

        ``pact-offline context 3\\n``, the kind, a newline; then, as little-endian int32, the number
        of spans, the start and end of each, and the ids.
        """
        return _key(self.kind, self.spans, _bytes_of(self.ids))


def _key(kind: ContextKind, spans: Sequence[tuple[int, int]], ids: bytes) -> bytes:
    numbers = [len(spans), *(number for span in spans for number in span)]
    said = f"pact-offline context 3\n{kind}\n".encode()
    said += struct.pack(f"<{len(numbers)}i", *numbers) + ids
    return hashlib.sha256(said).digest()[:KEY_BYTES]


def _bytes_of(ids: Sequence[int] | np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def key_bytes_of(example: TokenizedExample, header: Sequence[int]) -> list[bytes]:
    """The keys of `contexts_of`, at once."""
    ids, before = _bytes_of(example.ids), struct.pack(f"<{len(header)}i", *header)
    keys = [_key("full", [(turn.start, turn.end) for turn in example.turns], ids)]
    for turn in example.turns:
        start, end = (len(header) + at - turn.header for at in (turn.start, turn.end))
        alone = before + ids[4 * turn.header : 4 * turn.end]
        keys.append(_key("response_only", [(start, end)], alone))
    return keys


def full_context(example: TokenizedExample) -> Context:
    """The context with the prompt, and with every turn."""
    return Context("full", example.ids, tuple((turn.start, turn.end) for turn in example.turns))


def response_only_context(example: TokenizedExample, header: Sequence[int], turn: int) -> Context:
    """The context of one turn without its prompt: assistant header and response."""
    at = example.turns[turn]
    response = example.ids[at.header : at.end]
    ids = np.concatenate((np.asarray(header, dtype=np.int32), response))
    start = len(header) + at.start - at.header
    return Context("response_only", ids, ((start, len(ids)),))


def contexts_of(example: TokenizedExample, header: Sequence[int]) -> list[Context]:
    """The full context of an example, then the response-only context of each turn."""
    turns = range(len(example.turns))
    return [
        full_context(example),
        *(response_only_context(example, header, turn) for turn in turns),
    ]

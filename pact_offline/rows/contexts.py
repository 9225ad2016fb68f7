"""Contexts: what the reference model sees of a row, and the keys that name them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ContextKind = Literal["full", "response_only"]


CONTEXT_KINDS: tuple[ContextKind, ...] = ("full", "response_only")
KEY_BYTES = 16


@dataclass(frozen=True)
class TokenizedExample:
    """A row as the policy sees it.

    Attributes:
        ids: int32 [tokens], prompt and response.
        response_start: index of the first response token; at least 1.
        is_cut: whether the response went on, beyond the most tokens of a row.
    """

    ids: np.ndarray
    response_start: int
    is_cut: bool = False

    @property
    def steps(self) -> int:
        """Response steps: step t predicts response token t."""
        return len(self.ids) - self.response_start


@dataclass(frozen=True)
class Context:
    """What the reference model sees, and the steps it is read at.

    Attributes:
        kind: with the prompt ("full") or with the assistant header alone ("response_only").
        ids: int32 [tokens]; the last response token is not fed.
        response_start: number of tokens before the first response token; step t is read at
            position response_start - 1 + t.
    """

    kind: ContextKind
    ids: np.ndarray
    response_start: int

    @property
    def steps(self) -> int:
        return len(self.ids) - self.response_start + 1

    @property
    def key(self) -> str:
        """32 hex digits that name this context in every store.

        The first 16 bytes of SHA-256 over ``pact-offline context 1\\n``, the kind, a newline,
        and response_start and the ids as little-endian int32.
        """
        numbers = np.concatenate(([self.response_start], self.ids)).astype("<i4")
        digest = hashlib.sha256(f"pact-offline context 1\n{self.kind}\n".encode())
        digest.update(numbers.tobytes())
        return digest.digest()[:KEY_BYTES].hex()


def full_context(example: TokenizedExample) -> Context:
    """The context with the prompt."""
    return Context("full", example.ids[:-1], example.response_start)


def response_only_context(example: TokenizedExample, header: Sequence[int]) -> Context:
    """The context without the prompt: assistant header and response."""
    response = example.ids[example.response_start : -1]
    ids = np.concatenate((np.asarray(header, dtype=np.int32), response))
    return Context("response_only", ids, len(header))


def contexts_of(example: TokenizedExample, header: Sequence[int]) -> tuple[Context, Context]:
    """Both contexts of an example, in the order of CONTEXT_KINDS."""
    return full_context(example), response_only_context(example, header)

"""Texts tokenized whole or in parts, and which token a character lies in."""

from __future__ import annotations

from typing import Any, NamedTuple

_LEADS = "\n.a0"  # characters to put before a text, of which one is a token of its own


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        start: the character it begins at.
        tokens: its encoding; None without a fast tokenizer.
        offset: what to add to a token's number in the encoding.
        first: the number of its first token.
        lead: characters of the encoding that stand before the part.
    """

    start: int
    tokens: Any
    offset: int
    first: int
    lead: int = 0


def encode(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Encodings that know which token a character lies in; None without a fast tokenizer."""
    if not tokenizer.is_fast:
        return [None] * len(texts)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return list(backend.encode_batch(texts, add_special_tokens=False))


def encode_apart(tokenizer: Any, text: str, starts: list[int]) -> tuple[list[int], list[Piece]]:
    """A text's token ids, and its parts, each tokenized by itself.

    Args:
        tokenizer: of transformers.
        text: not empty.
        starts: the characters that the parts begin at, rising, from 0.
    """
    ids: list[int] = []
    pieces = []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        tokens, lead, skipped = _encode_behind(tokenizer, part, _LEADS if start else "")
        pieces.append(Piece(start, tokens, len(ids) - skipped, len(ids), lead))
        if tokens is None:
            ids += tokenizer(part, add_special_tokens=False).input_ids
        else:
            ids += tokens.ids[skipped:]
    return ids, pieces


def _encode_behind(tokenizer: Any, part: str, leads: str) -> tuple[Any, int, int]:
    """A part's tokens, without a space that a tokenizer of SentencePiece's kind begins texts with.

    Returns:
        encoding; characters and tokens in it that stand before the part.
    """
    alone = encode(tokenizer, [part])[0]
    if alone is not None and alone.tokens and alone.tokens[0].startswith("▁"):
        for lead in leads:
            tokens = encode(tokenizer, [lead + part])[0]
            first = tokens.char_to_token(1)
            if first is not None and tokens.token_to_chars(first)[0] == 1:
                return tokens, 1, first
    return alone, 0, 0


def token_at(pieces: list[Piece], at: int, limit: int) -> int:
    """The token that a character lies in, or the next that any character does."""
    piece = next(piece for piece in reversed(pieces) if piece.start <= at)
    if piece.tokens is None or at == piece.start:
        return int(piece.first)
    later = [other.first for other in pieces if other.start > piece.start]
    place = at - piece.start + piece.lead
    for char in range(place, place + 64):
        token = piece.tokens.char_to_token(char)
        if token is not None:
            return int(piece.offset + token)
    return later[0] if later else limit

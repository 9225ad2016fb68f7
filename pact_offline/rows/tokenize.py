"""From rows to tokens, cut where they are too long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pact_offline.errors import InputError
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.row import Row
from pact_offline.rows.spans import Spans, Turn, find_spans
from pact_offline.settings.stages import RowSettings


class LongRowError(InputError):
    """No answer of a row begins within the most tokens of a row."""


def tokenize(
    rows: Sequence[Row], chat: Chat, settings: RowSettings
) -> list[TokenizedExample | InputError]:
    """Tokenize rows by the chat template, cut at `max_tokens`.

    Returns:
        for each row its tokens; of one that cannot be used, why: the template refuses it or drops
        part of it, or (`LongRowError`) it has no response within `max_tokens`.
    """
    found = find_spans(chat, rows, settings.turns, train_scaffold=settings.scaffold == "response")
    header = len(chat.header_ids) if settings.long_rows == "cut" else 0
    return [
        spans if isinstance(spans, InputError) else _cut(spans, row, settings, header)
        for row, spans in zip(rows, found, strict=True)
    ]


def tokenize_all(rows: Sequence[Row], chat: Chat, settings: RowSettings) -> list[TokenizedExample]:
    """`tokenize`, where no row may fail.

    Raises:
        InputError: of the first that does.
    """
    examples = []
    for example in tokenize(rows, chat, settings):
        if isinstance(example, InputError):
            raise example
        examples.append(example)
    return examples


def _cut(
    spans: Spans, row: Row, settings: RowSettings, header: int
) -> TokenizedExample | InputError:
    ids, turns, limit = spans.ids, spans.turns, settings.max_tokens
    if len(ids) <= limit:
        return TokenizedExample(np.asarray(ids, dtype=np.int32), tuple(turns), unread=spans.unread)
    if turns[0].start >= limit:
        if settings.long_rows != "cut":
            return LongRowError(
                f"{row.origin}: expected a response within {limit} tokens, found a prompt of "
                f"{turns[0].start}; raise --max-tokens, shorten the row, or set --long-rows"
            )
        ids, turns = _without_beginning(ids, turns[0], limit, header)
    kept = [turn for turn in turns if turn.start < limit]
    kept[-1] = kept[-1]._replace(end=min(kept[-1].end, limit))
    ids = ids[: kept[-1].end]
    return TokenizedExample(np.asarray(ids, dtype=np.int32), tuple(kept), True, spans.unread)


def _without_beginning(
    ids: list[int], turn: Turn, limit: int, header: int
) -> tuple[list[int], list[Turn]]:
    """The first turn, with the end of its prompt that leaves room for it."""
    least = header + turn.start - turn.header  # the header, and what a template puts after it
    before = max(1, min(limit - 1, max(least, limit - (turn.end - turn.start))))
    gone = turn.start - before
    moved = Turn(*(max(place - gone, 0) for place in turn))
    return ids[gone : turn.end], [moved]

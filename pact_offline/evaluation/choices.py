"""Answers that are chosen from labels: the one a model finds likeliest, with none generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pact_offline.models.log_confidences import log_probabilities_of, response_logits
from pact_offline.rows.chat import Chat
from pact_offline.rows.row import Row


def choose(
    model: Any,
    chat: Chat,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    by_length: bool,
    batch_size: int,
    progress: Callable[[int], object],
    known: Mapping[int, str] | None = None,
    made: Callable[[dict[int, str]], object] | None = None,
) -> list[str]:
    """The likeliest label of each prompt, in their order.

    A label's likelihood is the sum of its tokens' log-probabilities where the answer begins; the
    end of the turn is not counted. Of labels that are equally likely, the first is chosen.

    Args:
        model, chat: a chat model.
        rows: the prompts.
        labels: to choose from.
        by_length: divide by the label's characters, as `acc_norm` of lm-eval.
        batch_size: prompts with a label each, at once.
        progress: called with the number of prompts done; known ones do not count.
        known: choices by the number of their prompt; these are not made again.
        made: called with the choices of a batch, by number.
    """
    lengths = np.array([len(label) for label in labels]) if by_length else np.ones(len(labels))
    chosen = dict(known or {})
    contexts = {i: _contexts(chat, row, labels) for i, row in enumerate(rows) if i not in chosen}
    order = sorted(contexts, key=lambda i: len(contexts[i][0][0]), reverse=True)
    at_once = max(1, batch_size // len(labels))
    for first in range(0, len(order), at_once):
        batch = order[first : first + at_once]
        flat = [context for i in batch for context in contexts[i]]
        found = _log_likelihoods(model, flat, batch_size).reshape(len(batch), len(labels))
        best = (found / lengths).argmax(axis=1)
        new = {i: labels[at] for i, at in zip(batch, best, strict=True)}
        chosen |= new
        if made is not None:
            made(new)
        progress(len(batch))
    return [chosen[i] for i in range(len(rows))]


_Context = tuple[list[int], list[tuple[int, int]]]


def _contexts(chat: Chat, row: Row, labels: Sequence[str]) -> list[_Context]:
    """The prompt with each label, tokenized apart where one would begin and the other ends."""
    prompt = chat.prompt_ids(row)
    return [
        ([*prompt, *ids], [(len(prompt), len(prompt) + len(ids))])
        for ids in map(chat.ids_of, labels)
    ]


def _log_likelihoods(model: Any, contexts: Sequence[_Context], batch_size: int) -> np.ndarray:
    """Summed log-probability of each context's label, float64 [contexts]."""
    found: list[float] = []
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        for logits, (ids, ((start, end),)) in zip(
            response_logits(model, batch), batch, strict=True
        ):
            labels = logits.new_tensor(ids[start:end]).long()
            found.append(float(log_probabilities_of(logits, labels).sum()))
    return np.array(found)

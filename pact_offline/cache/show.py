"""One row's targets as a table for a person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pact_offline.cache.targets import TargetCache
from pact_offline.errors import InputError
from pact_offline.rows.contexts import CONTEXT_KINDS
from pact_offline.texts import visible


def show_row(
    targets: TargetCache,
    index: int,
    texts: Sequence[str],
    response: Sequence[str],
    numbers: Sequence[int],
    columns: int,
) -> str:
    """Confidences (probabilities, %) of a row's response steps on its likeliest safety tokens.

    Args:
        targets: the cache.
        index: row, from 0.
        texts: decoded safety tokens, in the order of the ids.
        response: decoded response tokens, or none.
        numbers: of the steps, each from 0 in its turn; none: counted through.
        columns: how many safety tokens to show.

    Raises:
        InputError: no such row.
    """
    if not 0 <= index < len(targets):
        raise InputError(
            f"{targets.path}: expected a row from 0 to {len(targets) - 1}, found {index}"
        )
    lines = []
    labels = [np.exp(targets.read_labels([index], kind)) for kind in CONTEXT_KINDS]
    for kind, values, own in zip(CONTEXT_KINDS, targets[index], labels, strict=True):
        shares = np.exp(values)
        chosen = np.argsort(-shares.max(axis=0), kind="stable")[:columns]
        names = [visible(texts[i])[:9] for i in chosen]
        lines.append(f"{kind.replace('_', '-')} context, probabilities in %")
        lines.append(
            f"{'step':>4}  {'next token':12} {'its own':>9} {'rest':>9} "
            + " ".join(f"{n:>9}" for n in names)
        )
        for step, row in enumerate(shares):
            token = visible(response[step])[:12] if step < len(response) else ""
            rest = max(0.0, 1 - float(row.sum()))
            cells = " ".join(f"{100 * value:9.3f}" for value in (own[step], rest, *row[chosen]))
            number = numbers[step] if step < len(numbers) else step
            lines.append(f"{number:4}  {token:12} {cells}")
        lines.append("")
    return "\n".join(lines[:-1])

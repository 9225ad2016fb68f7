"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any

from pact_offline.errors import ModelError


def ends_of_answers(model: str, *ids: Any) -> list[int]:
    """The ids that configs, a tokenizer and a template name, each once.

    Args:
        model: its name, for messages.
        ids: an id, a list of them, or None, of each.

    Raises:
        ModelError: it is something else.
    """
    found = [one for value in ids for one in (value if isinstance(value, list) else [value])]
    for one in found:
        if one is not None and type(one) is not int:
            raise ModelError(
                f"{model}: eos_token_id: expected a token id, or a list of them, found {one!r:.60}"
            )
    return [*dict.fromkeys(one for one in found if one is not None)]

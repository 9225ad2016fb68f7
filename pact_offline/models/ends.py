"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any


def ends_of_answers(*ids: Any) -> list[int]:
    """The ids that configs, a tokenizer and a template name, each once.

    Args:
        ids: an id, a list of them, or None, of each.
    """
    found = [one for value in ids for one in (value if isinstance(value, list) else [value])]
    return [*dict.fromkeys(one for one in found if isinstance(one, int))]

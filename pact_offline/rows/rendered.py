"""Texts of messages that a chat template, or a format of prompts, has been written into already."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_offline.errors import InputError
from pact_offline.rows.row import Message

# The whole of a conversation in one text, up to where the next answer belongs.
_OPEN = re.compile(
    r"\s*(?:### )?(Human|User|USER):.*\n\s*((?:### )?(?:Assistant|ASSISTANT):)\s*", re.S
)


def rendered_already(
    messages: Sequence[Message], opening: str, ends: Sequence[str]
) -> InputError | None:
    """A message whose text brings along what a chat template writes around it, if there is one.

    Rendered again, its end of turn would be trained twice, and its turns stand within one turn.

    Args:
        messages: of a conversation.
        opening: the assistant header, where a token of its own is in it; else empty.
        ends: the tokens that end an answer.
    """
    for index, message in enumerate(messages):
        said = message["content"].rstrip()
        if message["role"] == "assistant":
            end = next((end for end in ends if said.endswith(end)), None)
            # In HTML </s> ends what <s> begins.
            if end is not None and (end[:2] != "</" or f"<{end[2:]}" not in said):
                return InputError(
                    f"messages[{index}].content: expected an answer without its end of turn, which "
                    f"the chat template writes, found {end!r} at its end; take it out"
                )
            continue
        found = opening if opening and said.endswith(opening) else ""
        if not found and message["role"] == "user" and (turns := _OPEN.fullmatch(said)):
            found = turns[2]
        if found:
            return InputError(
                f"messages[{index}].content: expected what one message says, found a conversation "
                f"as one text, which ends in {found!r}; write its turns as a list of messages"
            )
    return None

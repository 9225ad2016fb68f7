"""What a chat template leaves out of a conversation without a word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_offline.errors import InputError
from pact_offline.rows.row import THOUGHTS, Message

_WORD = re.compile(r"\w{3,}")


def left_out(messages: Sequence[Message], text: str) -> InputError | None:
    """A message of which nothing is in the rendered text, if there is one.

    A tool's answer may be written otherwise there, as JSON, but not without its words.
    """
    for index, message in enumerate(messages):
        for what, said in said_by(message):
            if said in text or (message["role"] == "tool" and _has_words(text, said)):
                continue
            return InputError(
                f"messages[{index}].{what}: expected in what the chat template renders, found "
                f"that it leaves this message of {message['role']:.40} out or changes it"
            )
    return None


def said_by(message: Message) -> list[tuple[str, str]]:
    """What a rendered message has to hold, by its key; of a thought templates keep the end."""
    calls = [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls") or ()]
    content = message["content"]
    if message["role"] == "assistant":
        content = content.rpartition("</think>")[2]
    if content.strip() or calls:
        return [("content", content.strip()), *calls]
    thought = next((key for key in THOUGHTS if message.get(key)), "content")
    return [(thought, str(message.get(thought, "")).strip())]


def _has_words(text: str, said: str) -> bool:
    words = _WORD.findall(said)
    return all(word in text for word in words[:8])

"""What a chat template leaves out of a conversation without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pact_offline.errors import InputError
from pact_offline.rows.row import THOUGHTS, Message

# Stands for a text where its place in what is rendered is looked up. It ends otherwise than it
# begins, so that no text beside it makes it begin sooner.
MARKER = "Qx7answer7xZ"
_WORD = re.compile(r"\w{3,}")
_AS_SAID = ("system", "user", "assistant")


def left_out(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]
) -> InputError | None:
    """A message of which nothing is in the rendered text, if there is one.

    Messages stand there in order, but for a system's, which some templates put below the others.
    A tool's answer may be written otherwise, as JSON, but not without its words; and with another
    in its place the text is another.

    Args:
        messages: of the conversation, from the first.
        text: what is rendered.
        render: renders these messages instead, to the same text where nothing is changed.
    """
    at = 0
    for index, message in enumerate(messages):
        is_as_said, ends = message["role"] in _AS_SAID, [at]
        for what, said in said_by(message):
            start = 0 if message["role"] == "system" else at
            found = text.find(said, start)
            is_in = found >= 0 or (not is_as_said and _has_words(text[start:], said))
            if is_in and (
                is_as_said or what != "content" or _is_read(messages, index, text, render)
            ):
                ends.append(found + len(said) if message["role"] != "system" else at)
                continue
            return InputError(
                f"messages[{index}].{what}: expected in what the chat template renders, found "
                f"that it leaves this message of {message['role']:.40} out or changes it"
            )
        at = max(ends)
    return None


def _is_read(
    messages: Sequence[Message], index: int, text: str, render: Callable[[Sequence[Message]], str]
) -> bool:
    """Whether a message decides what is rendered."""
    other = {**messages[index], "content": MARKER}
    try:
        return render([*messages[:index], other, *messages[index + 1 :]]) != text
    except InputError:  # as where the template wants JSON there
        return True


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

"""What a chat template leaves out of a conversation without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pact_offline.errors import InputError
from pact_offline.rows.row import THOUGHTS, Message

# Stands for a text where its place in what is rendered is looked up. It ends otherwise than it
# begins, so that no text beside it makes it begin sooner.
MARKER = "Qx7answer7xZ"
MERGE = " (--system-role merge puts the system message before what the user says first)"
_WORD = re.compile(r"\w{3,}")
_AS_SAID = ("system", "user", "assistant")


def left_out(
    messages: Sequence[Message],
    text: str,
    render: Callable[[Sequence[Message]], str],
    behind: Sequence[Message] = (),
    *,
    is_merged: bool = False,
) -> InputError | None:
    """A message of which nothing is in the rendered text, if there is one.

    Messages stand there in order, but for a system's, which some templates put below the others,
    and a tool's, which may stand before the text of the message that called it. A tool's answer may
    be written otherwise, as JSON, but not without its words; and where those are others' too, the
    text is another with another answer in its place.

    Args:
        messages: of the conversation, from the first.
        text: what is rendered.
        render: renders these messages instead, to the same text where nothing is changed.
        behind: further messages that the text holds.
        is_merged: whether the template merges a system message already.
    """
    at = called = 0  # where the last message ends; where the one begins that called tools
    for index, message in enumerate(messages):
        role, ends = message["role"], [at]
        start = 0 if role == "system" else at if role in _AS_SAID else called
        others = (*messages[:index], *messages[index + 1 :], *behind)
        for what, said in said_by(message):
            found = text.find(said, start)
            if role in _AS_SAID or what != "content":
                is_in = found >= 0
            else:
                is_its_own = found >= 0 and not any(said in str(one["content"]) for one in others)
                has_words = is_its_own or found >= 0 or _has_words(text[start:], said)
                is_in = is_its_own or (has_words and _is_read(messages, index, text, render))
            if not is_in:
                can_help = index == 0 and not is_merged and can_merge(messages)
                mended = MERGE if can_help else ""
                return InputError(
                    f"messages[{index}].{what}: expected in what the chat template renders, found "
                    f"that it leaves this message of {role:.40} out or changes it{mended}"
                )
            if found >= 0 and role != "system":
                ends.append(found + len(said))
        called = at if role == "assistant" else called
        at = max(ends)
    return None


def can_merge(messages: Sequence[Message]) -> bool:
    """Whether a system message stands before what the user says first."""
    return [message["role"] for message in messages[:2]] == ["system", "user"]


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

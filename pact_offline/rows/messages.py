"""One message of a row: its role, what it says, its calls of tools, and whether it is trained."""

from __future__ import annotations

from typing import Any

from pact_offline.errors import InputError
from pact_offline.rows.calls import calls_of
from pact_offline.rows.columns import written
from pact_offline.rows.row import Message, has_answer
from pact_offline.rows.values import key_names, require_unicode, shown, text_of

# What a role is called, in any case, and what it becomes.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bard": "assistant",
    "prompter": "user",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLING = ("function_call", "tool_call")  # roles of a message that is a call
_CONTROLS = ("weight", "train", "training")  # whether it is learnt
_READ = ("role", "from", "content", "value", "train_detail", *_CONTROLS)


def is_message(value: Any) -> bool:
    """Whether it is one message of a conversation."""
    if not isinstance(value, dict):
        return False
    role = str(value.get("role", value.get("from")))
    says = any(isinstance(value.get(key), str) for key in ("content", "value", "text"))
    return says and role.lower() in ROLES


def message_of(item: Any, place: str, origin: str) -> Message:
    """A message as the chat template gets it.

    Args:
        item: of the row.
        place: its key and number there.
        origin: the row's file and line.

    Raises:
        InputError: names all three, what was expected and what was found.
    """
    if not isinstance(item, dict):
        raise InputError(f"{origin}: {place}: expected role and content, found {shown(item)}")
    item = {key: part for key, part in item.items() if part is not None}
    given = item.get("role", item.get("from"))
    if given is None:
        keys = {key.lower(): key for key in item}
        named = {ours: keys[ours] for ours in ("role", "content") if ours in keys}
        mended = f"; name them, as in --columns {written(named)}" if len(named) == 2 else ""
        raise InputError(
            f"{origin}: {place}: expected role and content, found the keys {key_names(item)}"
            f"{mended}"
        )
    given = text_of(given, f"{place}.role", origin)
    message: Message = {"role": ROLES.get(given.lower(), given), "content": ""}
    others = {name: part for name, part in item.items() if name not in _READ}
    message |= require_unicode(others, place, origin)
    for name in ("function_call", "tool_calls"):  # the first is OpenAI's older one
        given_calls = message.pop(name, None)
        if given_calls and (calls := calls_of(given_calls, f"{place}.{name}", origin)):
            message["tool_calls"] = calls
    content = item.get("content", item.get("value"))
    if given.lower() in _CALLING and "tool_calls" not in message:
        said = "content" if "content" in item else "value"
        message["tool_calls"] = calls_of(content, f"{place}.{said}", origin)
    elif content is not None:
        message["content"] = text_of(content, f"{place}.content", origin)
    elif not has_answer(message):
        raise InputError(f"{origin}: {place}.content: expected text, found none")
    return message


def is_trained(item: dict[str, Any], place: str, origin: str) -> bool:
    """Whether a message says that it may be learnt.

    Raises:
        InputError: it says so of a part, or in other words.
    """
    for key in _CONTROLS:
        if item.get(key) not in (None, 0, 1):
            raise InputError(f"{origin}: {place}.{key}: expected 0 or 1, found {shown(item[key])}")
    if item.get("train_detail"):
        raise InputError(
            f"{origin}: {place}.train_detail: expected a message that is trained as a whole or not "
            "at all (train), found parts of it"
        )
    return all(item.get(key) != 0 for key in _CONTROLS)

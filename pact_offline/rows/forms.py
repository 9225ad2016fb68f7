"""The forms that a row may have, and how each becomes a conversation.

A value of null counts as a key that is not there, as it does where Parquet fills one in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pact_offline.errors import InputError
from pact_offline.rows.calls import tool_of
from pact_offline.rows.columns import mapped, no_column, renamed
from pact_offline.rows.messages import is_message, is_trained, message_of
from pact_offline.rows.row import Message, Row, has_answer
from pact_offline.rows.suggested_columns import hint
from pact_offline.rows.values import (
    category_of,
    key_name,
    key_names,
    require_unicode,
    shown,
    text_of,
)

_SYSTEMS = ("system", "system_prompt", "system_message")
_ANSWERS = ("response", "completion", "output", "answer")
_CONVERSATIONS = ("messages", "conversations")
_NO_TEXTS = ("image", "video", "audio")  # keys beside a conversation, and marks in it
_TEXT_OR_LIST = "text or a list of messages"


class _Keys:
    """A row's values, and which of its keys have been read."""

    def __init__(self, value: Mapping[str, Any], origin: str) -> None:
        self._value = {key: item for key, item in value.items() if item is not None}
        self.origin = origin
        self._read: set[str] = set()
        self.not_trained: set[int] = set()
        self.unread_in_messages: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._value.get(key)

    @property
    def values(self) -> Mapping[str, Any]:
        return self._value

    @property
    def names(self) -> str:
        return key_names(self._value)

    @property
    def unread(self) -> tuple[str, ...]:
        keys = [key for key in self._value if key not in self._read]
        return (*map(key_name, keys), *self.unread_in_messages)

    def text(self, key: str) -> str:
        """The text under a key; empty where it is not there."""
        value = self[key]
        if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value):
            raise InputError(
                f"{self.origin}: {key}: expected text, found a list of {len(value)} texts; "
                f"--columns names one of them ({key}.0 is the first)"
            )
        if isinstance(value, list) and value and is_message(value[0]):
            answer = self.first(*_ANSWERS) or "ANSWER"
            raise InputError(
                f"{self.origin}: {key}: expected text, found a list of messages, which is read as "
                f"in --columns prompt={key},response={answer}"
            )
        return "" if value is None else text_of(value, key, self.origin)

    def first(self, *keys: str) -> str | None:
        """The first of some keys that is there."""
        return next((key for key in keys if key in self), None)

    def listed(self, key: str, expected: str = "a list") -> list[Any]:
        """The list under a key, also where it is written as JSON text."""
        value = self[key]
        if isinstance(value, str) and value.strip()[:1] in ("[", ""):
            with suppress(ValueError, RecursionError):
                value = json.loads(value) if value.strip() else []
        if not isinstance(value, list):
            is_python = isinstance(value, str) and value.strip()[:2] in ("['", "[{")
            mended = ", which is no JSON" if is_python else ""
            raise InputError(
                f"{self.origin}: {key}: expected {expected}, found {shown(value)}{mended}"
            )
        return value


@dataclass(frozen=True)
class Form:
    """One form of a row.

    Attributes:
        keys: those that tell it.
        others: those that it also reads; alternatives are parted by a bar.
        parse: gives the messages.
    """

    keys: tuple[str, ...]
    others: tuple[str, ...]
    parse: Callable[[_Keys], list[Message]]

    def fits(self, value: _Keys) -> bool:
        return all(key in value for key in self.keys)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(value: _Keys) -> list[Message]:
    text = value.text(value.first(*_SYSTEMS) or "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _conversation(key: str) -> Callable[[_Keys], list[Message]]:
    def parse(value: _Keys) -> list[Message]:
        return _below_system(value, _messages(value, key))

    return parse


def _below_system(value: _Keys, messages: list[Message]) -> list[Message]:
    """Messages, below what the row gives as its system message beside them."""
    system = _system(value)
    if system == messages[:1]:
        return messages
    if system and messages[0]["role"] == "system":
        raise InputError(
            f"{value.origin}: {value.first(*_SYSTEMS)}: expected one system message, found two"
        )
    value.not_trained = {i + len(system) for i in value.not_trained}
    return [*system, *messages]


def _prompt(value: _Keys) -> list[Message]:
    if isinstance(value["prompt"], str):
        prompt = [_user(value.text("prompt"))]
    else:
        prompt = _messages(value, "prompt", _TEXT_OR_LIST)
        value.not_trained = {i for i, m in enumerate(prompt) if m["role"] == "assistant"}
    prompt = _below_system(value, prompt)
    key = value.first("response", "completion")
    if key is None:
        return prompt
    if isinstance(value[key], str):
        return [*prompt, _answer(value.text(key))]
    if all(isinstance(item, str) for item in value.listed(key, _TEXT_OR_LIST)):
        return [*prompt, _answer(value.text(key))]
    before = value.not_trained
    completion = _messages(value, key, _TEXT_OR_LIST)
    # Data of preferences gives whole conversations, which begin with the prompt.
    whole = [m for m in prompt if m["role"] != "system" or completion[0]["role"] == "system"]
    again = len(whole) if completion[: len(whole)] == whole else 0
    value.not_trained = before | {i + len(prompt) - again for i in value.not_trained if i >= again}
    return [*prompt, *completion[again:]]


def _instruction(value: _Keys) -> list[Message]:
    question, answers = value.text("instruction"), value.first("output", "response")
    if extra := value.text("input"):
        question = f"{question} {extra}" if question else extra
    question = _with_context(question, value)
    messages = _system(value)
    for index, pair in enumerate(value.listed("history") if "history" in value else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{value.origin}: history[{index}]: expected a question and its answer, found "
                f"{shown(pair)}"
            )
        asked, answered = (text_of(item, f"history[{index}]", value.origin) for item in pair)
        messages += [_user(asked), _answer(answered)]
    messages.append(_user(question))
    return [*messages, _answer(value.text(answers))] if answers else messages


def _with_context(question: str, value: _Keys) -> str:
    context = value.text("context")
    return f"{question}\n\n{context}" if context.strip() else question


def _pair(question: str, *answers: str) -> Callable[[_Keys], list[Message]]:
    def parse(value: _Keys) -> list[Message]:
        asked = [*_system(value), _user(_with_context(value.text(question), value))]
        key = value.first(*answers)
        return [*asked, _answer(value.text(key))] if key else asked

    return parse


# docs/rows.md says what each becomes, with an example.
FORMS = (
    Form(("messages",), ("system", "tools|functions"), _conversation("messages")),
    Form(("conversations",), ("system", "tools|functions"), _conversation("conversations")),
    Form(("prompt",), ("response|completion", "system", "tools"), _prompt),
    Form(
        ("instruction",), ("input", "output|response", "system", "history", "context"), _instruction
    ),
    Form(
        ("question",),
        ("answer|response", "system", "context"),
        _pair("question", "answer", "response"),
    ),
    Form(("input", "output"), ("system", "context"), _pair("input", "output")),
)


def parse_row(
    value: Any,
    origin: str,
    *,
    needs_response: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Row:
    """Read one row in any of the forms.

    Args:
        value: of the file.
        origin: file and line.
        needs_response: refuse a row with no assistant message that may be trained.
        columns: names of `COLUMNS` to the row's own, nested ones by a dot; then nothing else of the
            row is read.

    Raises:
        InputError: names `origin`, the key, what was expected and what was found.
    """
    if not isinstance(value, dict):
        wanted = ', as in {"messages": […]}' if isinstance(value, list) else ""
        raise InputError(f"{origin}: expected an object{wanted}, found {type(value).__name__}")
    fields = dict(columns or {})
    inner = {ours: theirs for ours in ("role", "content") if (theirs := fields.pop(ours, None))}
    given = value
    left_over: tuple[str, ...] = ()
    if fields:
        asked = fields if needs_response else {k: v for k, v in fields.items() if k not in _ANSWERS}
        value, left_over = mapped(given, fields, asked, origin)
    is_mapped = value is not given
    if inner:
        value = {key: renamed(item, inner) for key, item in value.items()}
    keys = _Keys(value, origin)
    form = next((form for form in FORMS if form.fits(keys)), None)
    if form is None:
        if fields and not is_mapped:
            raise no_column(given, fields, origin)
        mended = " by --columns" if fields else hint(keys.values, FORMS)
        raise InputError(
            f"{origin}: expected a known form (messages, conversations, prompt, instruction, "
            f"question, or input and output), found the keys {keys.names}{mended}"
        )
    messages = form.parse(keys)
    named = keys.first("tools", "functions")
    tools = _tools(keys, named) if named else None
    if needs_response:
        _require_wanted(keys)
    _require_text_alone(keys, messages)
    row = Row(
        tuple(messages),
        origin,
        tools,
        frozenset(keys.not_trained),
        (*keys.unread, *left_over),
        category_of(given),
    )
    if not any(has_answer(message) for message in row.prompt):
        raise InputError(f"{origin}: expected a prompt, found none")
    if needs_response:
        _require_response(row, form, keys)
    return row


def _require_wanted(value: _Keys) -> None:
    """Refuse an answer that the row itself says is a bad one, as data for KTO does."""
    is_of_kto = {"prompt", "completion"} <= {*value.values} or value.first(*_CONVERSATIONS)
    for key in ("kto_tag", "label") if is_of_kto else ("kto_tag",):
        wanted = str(value.values.get(key)).lower()  # a table has no booleans
        if wanted == "true":
            value[key]
        elif wanted == "false":
            raise InputError(
                f"{value.origin}: {key}: expected a response to learn, found one that is marked as "
                "undesired (false)"
            )


def _require_text_alone(value: _Keys, messages: list[Message]) -> None:
    """Refuse a row whose messages say where a picture, a film or a sound beside them stands."""
    for key in (name + end for name in _NO_TEXTS for end in ("", "s")):
        mark = f"<{key.removesuffix('s')}>"
        if value.values.get(key) and any(mark in message["content"] for message in messages):
            raise InputError(
                f"{value.origin}: {key}: expected a conversation of text alone, found one with "
                f"{mark} in it"
            )


def _require_response(row: Row, form: Form, keys: _Keys) -> None:
    trained = [index for index in row.answers if index not in row.not_trained]
    if any(has_answer(row.messages[index]) for index in trained):
        return
    names = [key for key in form.others if {*key.split("|")} & {*_ANSWERS}] or [*form.keys[-1:]]
    raise InputError(
        f"{row.origin}: {names[0].replace('|', ' or ')}: expected a response, found none"
        + (" to learn" if row.answers and not trained else "")
        + (_where_it_may_be(row, keys) if not row.answers else "")
    )


def _where_it_may_be(row: Row, keys: _Keys) -> str:
    found = f" among the keys {keys.names}"
    others = dict.fromkeys(str(m["role"]) for m in row.messages if m["role"] != "system")
    if len(row.messages) > 1 and [*others] != ["user"]:
        roles = dict.fromkeys(str(message["role"]) for message in row.messages)
        found = f"{found}, and the roles {key_names(roles)}"
    return found + hint(keys.values, FORMS, is_known=True)


def _messages(value: _Keys, key: str, expected: str = "a list of messages") -> list[Message]:
    items = value.listed(key, expected)
    if key == "conversations" and all(isinstance(item, str) for item in items):
        items = [(_answer if i % 2 else _user)(text) for i, text in enumerate(items)]
    if not items:
        raise InputError(f"{value.origin}: {key}: expected a list of messages, found an empty one")
    places = {f"{key}[{index}]": item for index, item in enumerate(items)}
    messages = [message_of(item, place, value.origin) for place, item in places.items()]
    trained = [is_trained(item, place, value.origin) for place, item in places.items()]
    value.not_trained = {index for index, learnt in enumerate(trained) if not learnt}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if any(None not in (item.get(ours), item.get(theirs)) for item in items):
            value.unread_in_messages.append(f"messages[].{theirs}")
    return messages


def _tools(value: _Keys, key: str) -> tuple[Any, ...] | None:
    tools = tuple(map(tool_of, value.listed(key)))
    return require_unicode(tools, key, value.origin) or None

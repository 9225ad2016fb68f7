"""Rows whose keys have other names than ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pact_offline.errors import InputError
from pact_offline.rows.values import key_name, key_names

_MISSING = object()
# What columns are called that hold a question or its answer, the likeliest first.
_QUESTIONS = (
    "prompt",
    "question",
    "query",
    "instruction",
    "problem",
    "input",
    "request",
    "user",
    "human",
    "source",
    "document",
    "article",
    "dialogue",
    "passage",
    "sentence",
    "text",
)
_RESPONSES = (
    "response",
    "answer",
    "completion",
    "output",
    "solution",
    "reply",
    "assistant",
    "gpt",
    "target",
    "summary",
    "chosen",
    "label",
)
_SAID = ("content", "value", "text", "message", "utterance", "body", "said")
_ROLES = {
    "user",
    "assistant",
    "human",
    "gpt",
    "bot",
    "system",
    "ai",
    "model",
    "prompter",
    "agent",
    "customer",
}


def mapped(
    value: dict[str, Any], columns: Mapping[str, str], required: Mapping[str, str], origin: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The values that `columns` names, under our names; and the row's other keys.

    A row that has none of them stays as it is.
    """
    found = {ours: _at(value, theirs, _MISSING) for ours, theirs in columns.items()}
    if all(item is _MISSING for item in found.values()):
        return value, ()
    found = {
        ours: None if item is _MISSING and ours not in required else item
        for ours, item in found.items()
    }
    if missing := {ours: columns[ours] for ours in found if found[ours] is _MISSING}:
        raise no_column(value, missing, origin)
    taken = {theirs if theirs in value else theirs.split(".")[0] for theirs in columns.values()}
    return found, tuple(
        key_name(key) for key in value if key not in taken and value[key] is not None
    )


def no_column(value: dict[str, Any], columns: Mapping[str, str], origin: str) -> InputError:
    first = next(iter(columns.values()))
    return InputError(f"{origin}: columns: expected the key {first}, found {key_names(value)}")


def _at(value: Any, place: str, missing: Any = None) -> Any:
    """What lies under a key, or under keys parted by dots; `missing` where there is no such key."""
    for part in [place] if isinstance(value, dict) and place in value else place.split("."):
        if value is None:  # as Parquet has it, where other rows hold keys
            return None
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part, missing) if isinstance(value, dict) else missing
    return value


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A list of messages with some of their keys under our names."""
    if not isinstance(value, list):
        return value
    return [_renamed_message(item, names) if isinstance(item, dict) else item for item in value]


def _renamed_message(message: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    found = {ours: _at(message, theirs, _MISSING) for ours, theirs in names.items()}
    found = {ours: part for ours, part in found.items() if part is not _MISSING}
    places = [names[ours] for ours in found]
    taken = {theirs if theirs in message else theirs.split(".")[0] for theirs in places}
    others = {key: part for key, part in message.items() if key not in taken}
    return {**others, **found}


def suggestion(value: Mapping[str, Any]) -> str:
    """A mapping to write for a row of no known form, by what its keys are called."""
    places = dict(_places(value))
    for place, item in places.items():
        if (inner := _of_messages(item)) is not None:
            return f"messages={place}{inner}"
    texts = [place for place, item in places.items() if isinstance(item, str)]
    texts = [place for place in texts if "rejected" not in place.lower()]
    first, second = _likeliest(texts, _QUESTIONS), _likeliest(texts, _RESPONSES)
    if first is None and second is None and len(texts) == 2:
        first, second = texts
    elif len(texts) == 2 and None in (first, second):
        other = next(place for place in texts if place not in (first, second))
        first, second = first or other, second or other
    return f"prompt={first or 'QUESTION'},response={second or 'ANSWER'}"


def _places(value: Mapping[str, Any], depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Each key with its value, nested ones by a dot."""
    for key, item in value.items():
        if isinstance(item, dict) and depth:
            yield from ((f"{key_name(key)}.{inner}", v) for inner, v in _places(item, depth - 1))
        else:
            yield key_name(key), item


def _likeliest(places: Sequence[str], names: Sequence[str]) -> str | None:
    """The place that is called, or else partly called, by the first of some names."""
    own = {place: place.rpartition(".")[2].lower() for place in places}
    for fits in (str.__eq__, str.endswith):
        for name in names:
            found = next((place for place, last in own.items() if fits(last, name)), None)
            if found is not None:
                return found
    return None


def _of_messages(value: Any) -> str | None:
    """How the keys of a list of messages are to be mapped; None: it is no such list."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    texts = {key: part for key, part in value[0].items() if isinstance(part, str)}
    role = next((k for k, part in texts.items() if part.lower() in _ROLES), None)
    said = _likeliest([key for key in texts if key != role], _SAID)
    if role is None or said is None:
        return None
    wanted = {"role": role, "content": said}
    known = {"role": ("role", "from"), "content": ("content", "value")}
    return "".join(f",{ours}={key_name(t)}" for ours, t in wanted.items() if t not in known[ours])

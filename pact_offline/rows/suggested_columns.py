"""Which columns a row of no known form may mean, by what its keys are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pact_offline.rows.values import key_name

# What keys are called that hold a question, its answer or what a message says, the likeliest first.
_QUESTIONS = (
    "prompt", "question", "query", "instruction", "problem", "input", "request", "user", "human",
    "source", "document", "article", "dialogue", "passage", "sentence", "text",
)  # fmt: skip
_RESPONSES = (
    "response", "answer", "completion", "output", "solution", "reply", "assistant", "gpt", "target",
    "summary", "chosen", "label",
)  # fmt: skip
_SAID = ("content", "value", "text", "message", "utterance", "body", "said")
_ROLES = (
    "user", "assistant", "human", "gpt", "bot", "system", "ai", "model", "prompter", "agent",
    "customer",
)  # fmt: skip


def suggestion(value: Mapping[str, Any]) -> str:
    """A mapping to write for a row of no known form."""
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

"""Which columns a row of no known form may mean, by what its keys are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pact_offline.rows.columns import written
from pact_offline.rows.messages import ROLES, is_message
from pact_offline.rows.values import from_json, key_name, key_names

# What others call a question, its answer, and what a message says; the likeliest first.
_QUESTIONS = (
    "instruction", "prompt", "question", "query", "problem", "input", "inputs", "request", "user",
    "human", "document", "article", "dialogue", "text",
)  # fmt: skip
_ANSWERS = (
    "response", "answer", "completion", "output", "solution", "reply", "assistant", "target",
    "targets", "summary", "highlights", "chosen", "answers", "label",
)  # fmt: skip
_CONTENTS = ("content", "value", "text", "message", "said", "parts")
# What a form reads beside a question and its answer.
_BESIDE = {"system": ("system", "system_prompt", "system_message"), "tools": ("tools", "functions")}
_UNWANTED = ("reject", "incorrect", "wrong")  # in the name of what is not to be learnt
_ONE_TEXT = re.compile(  # a conversation: how it begins, and what stands before an answer
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|"
    r"<start_of_turn>|<\|user\|>|<\|system\|>|\[INST\]|(?:### ?)?(?:Human|User|USER|SYSTEM):)"
    r"(?s:.*)(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant|<start_of_turn>model|"
    r"<\|assistant\|>|\[/INST\]|(?:Assistant|ASSISTANT|GPT):)"
)


class _Form(Protocol):
    """Which keys tell a form, and which it also reads; alternatives are parted by a bar."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def others(self) -> tuple[str, ...]: ...


class _Messages(NamedTuple):
    """A list of messages: whose they are, and its keys that have to be named, by our names."""

    roles: list[str]
    columns: dict[str, str]


def hint(value: Mapping[str, Any], forms: Sequence[_Form], *, is_known: bool = False) -> str:
    """What the owner of a row may do, behind what is wrong with it.

    Args:
        value: the row.
        forms: those there are.
        is_known: it has one of them, but no answer; then nothing is said where none is found.
    """
    if is_message(value):
        return (
            "; this is one message of a conversation, and a row holds all of it, as in "
            '{"messages": [{"role": "user", "content": "…"}, …]}'
        )
    by_keys = {form.keys: form for form in forms}
    places = dict(_places(value))
    lists = {place: found for place, item in places.items() if (found := _messages(item))}
    for place, found in lists.items():
        if {*found.roles} > {"assistant"}:
            beside = _read_beside(by_keys["messages",], places)
            if found.roles[0] == "system":
                beside.pop("system", None)
            return _named({"messages": place, **found.columns, **beside})

    texts = _texts({place: item for place, item in places.items() if place not in lists})
    question = _first(lists, {"user", "system"}) or _likeliest(texts, _QUESTIONS)
    answer = _first(lists, {"assistant"}) or _likeliest(texts, _ANSWERS)
    if answer is None and is_known:
        return ""
    several = [place for place, item in places.items() if _is_list_of(item, str) and item[1:]]
    if several and question is None and answer is None:
        return _named({"conversations": several[0]})
    if len(texts) == 2:
        others = [place for place in texts if place not in (question, answer)]
        question, answer = question or others.pop(0), answer or others.pop(0)
    if problem := _in_no_columns(places, texts, question, answer):
        return problem
    name = _name(question) if question in texts else "prompt"
    form = by_keys.get((name,), by_keys["prompt",])
    beside = _read_beside(form, places, answer or "ANSWER")
    return _named({form.keys[0]: question or "QUESTION", **beside})


def _named(columns: Mapping[str, str]) -> str:
    return f"; name them, as in --columns {written(columns)}"


def _in_no_columns(
    places: Mapping[str, Any], texts: Mapping[str, str], question: str | None, answer: str | None
) -> str:
    """What is wrong with a row that no names would mend; empty: nothing is."""
    is_unsure = None in (question, answer)
    for place, text in texts.items():
        if (is_unsure or place in (question, answer)) and _ONE_TEXT.match(text):
            return (
                f"; {key_name(place)} is a conversation as one text, whose turns belong in a list "
                "of messages"
            )
    for place, item in places.items():
        if is_unsure and _is_list_of(item, dict):
            return (
                f"; {key_name(place)} holds a list of {key_names(item[0])}: rows belong in a JSON "
                "array or one a line, turns in a list of messages with role and content"
            )
    return ""


def _read_beside(
    form: _Form, places: Mapping[str, Any], answer: str | None = None
) -> dict[str, str]:
    """What a form reads beside its own key: the answer, and what a row has by the very name."""
    columns = {}
    for ours in (key.split("|")[0] for key in form.others):
        names = _BESIDE.get(ours, (ours,))
        own = (place for place in places if _name(place) in names)
        if theirs := answer if ours in _ANSWERS else next(own, None):
            columns[ours] = theirs
    return columns


def _places(value: Mapping[str, Any], depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Each key that may be learnt from, with its value; nested ones by a dot."""
    for key, item in value.items():
        if any(word in str(key).lower() for word in _UNWANTED):
            continue
        if isinstance(item, dict) and depth:
            yield from ((f"{key}.{inner}", v) for inner, v in _places(item, depth - 1))
        else:
            yield str(key), item


def _texts(places: Mapping[str, Any]) -> dict[str, str]:
    """Those that a question or an answer may be; of a list of texts the first."""
    found = {}
    for place, item in places.items():
        if any(_name(place) in names for names in _BESIDE.values()):
            continue
        if isinstance(item, str):
            found[place] = item
        elif _is_list_of(item, str):
            found[f"{place}.0"] = item[0]
    return found


def _name(place: str) -> str:
    """What a place is called: its last key that says more than that there is a text."""
    parts = place.strip().lower().split(".")
    said = (part for part in reversed(parts) if part not in _CONTENTS and not part.isdecimal())
    return next(said, parts[-1])


def _likeliest(places: Collection[str], names: Sequence[str]) -> str | None:
    """The place that is called, or else whose name ends, as the first of some names."""
    for fits in (str.__eq__, str.endswith):
        for name in names:
            for place in places:
                if fits(_name(place), name):
                    return place
    return None


def _first(lists: Mapping[str, _Messages], roles: set[str]) -> str | None:
    return next((place for place, found in lists.items() if {*found.roles} <= roles), None)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, kind) for i in value)


def _messages(value: Any) -> _Messages | None:
    """A list of messages, also as JSON text; None: it is none that can be read."""
    items = from_json(value)
    if not _is_list_of(items, dict):
        return None
    first = {key: part for key, part in items[0].items() if isinstance(part, str | list)}
    role = next((key for key, part in first.items() if str(part).lower() in ROLES), None)
    content = _likeliest([key for key in first if key != role], _CONTENTS)
    if role is None or content is None:
        return None
    known = {"role": ("role", "from"), "content": ("content", "value")}
    columns = {o: t for o, t in (("role", role), ("content", content)) if t not in known[o]}
    if columns and items is not value:  # keys within a JSON text cannot be named
        return None
    return _Messages([ROLES.get(str(i.get(role)).lower(), "") for i in items], columns)

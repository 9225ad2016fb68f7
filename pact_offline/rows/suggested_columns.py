"""Which columns a row of no known form may mean, by what its keys are called."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pact_offline.rows.values import from_json, key_name, key_names

# What keys are called that hold a question, its answer or what a message says, the likeliest first.
_QUESTIONS = (
    "prompt", "question", "query", "instruction", "problem", "input", "inputs", "request", "user",
    "human", "source", "document", "article", "dialogue", "passage", "sentence", "text",
)  # fmt: skip
_RESPONSES = (
    "response", "answer", "completion", "output", "solution", "reply", "assistant", "gpt", "target",
    "targets", "summary", "highlights", "chosen", "answers", "label",
)  # fmt: skip
_SAID = ("content", "value", "text", "message", "utterance", "body", "said", "parts")
_ROLES = (
    "user", "assistant", "human", "gpt", "bot", "system", "ai", "model", "prompter", "agent",
    "customer", "tool",
)  # fmt: skip
_ANSWERING = ("assistant", "gpt", "bot", "ai", "model")
_UNWANTED = ("reject", "incorrect", "wrong")  # in the name of what is not to be learnt
_BESIDE = {"system": ("system", "system_prompt", "system_message"), "tools": ("tools", "functions")}
# A conversation in one text: how it begins, and what stands before an answer.
_BEGINS = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*(?:<\|im_start\|>|<\|start_header_id\|>|"
    r"<start_of_turn>|<\|user\|>|<\|system\|>|\[INST\]|(?:### ?)?(?:Human|User|USER|SYSTEM):)"
)
_ANSWERS_THERE = re.compile(
    r"<\|im_start\|>assistant|<\|start_header_id\|>assistant|<start_of_turn>model|<\|assistant\|>|"
    r"\[/INST\]|(?:Assistant|ASSISTANT|GPT):"
)


class _Form(Protocol):
    """Which keys tell a form, and which it also reads; alternatives are parted by a bar."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def others(self) -> tuple[str, ...]: ...


def hint(value: Mapping[str, Any], forms: Sequence[_Form], answers: Sequence[str]) -> str:
    """What the owner of a row of no known form may do, behind what is wrong with it.

    Args:
        value: the row.
        forms: those there are.
        answers: names that they have for an answer.
    """
    if is_message(value):
        return (
            "; this is one message of a conversation, and a row holds all of it, as in "
            '{"messages": [{"role": "user", "content": "…"}, …]}'
        )
    found = _of_lists(value) or _in_other_letters(value, forms, answers) or _of_texts(value)
    texts, is_unsure = _texts(value), {"QUESTION", "ANSWER"} & {*found.values()}
    if place := _as_one_text(texts, texts if is_unsure else found.values()):
        return _written_as_one_text(place)
    lists = [key for key, item in value.items() if _is_rows(item)]
    if lists and is_unsure:
        keys = key_names(value[lists[0]][0])
        return (
            f"; {key_name(lists[0])} holds a list of {keys}: rows belong in a JSON array or one a "
            "line, turns in a list of messages with role and content"
        )
    return f"; name them, as in --columns {written(found)}"


def hint_of_answer(
    value: Mapping[str, Any], form: _Form, forms: Sequence[_Form], answers: Sequence[str]
) -> str:
    """The same for a row of a known form, of which the answer is called otherwise."""
    lists, own = _of_lists(value), form.keys[0]
    if lists and lists.get("messages") != own:
        return f"; name it, as in --columns {written(lists)}"
    others = [one for one in forms if one is not form and _has_answer(value, one, answers)]
    if others:
        found = _named(value, {key: key for key in value}, others[0])
        return f"; name them, as in --columns {written(found)}"
    found = _named(value, {key: key for key in value}, form)
    texts = {place: item for place, item in _texts(value).items() if place not in found}
    if form.keys[0] in ("messages", "conversations", "prompt"):
        texts |= {p: "" for p, item in _places(value) if _answers_alone(item)}
    place = _likeliest(list(texts), _RESPONSES) or _first_of_several(value)
    if place is None:
        return ""
    if other := _as_one_text(_texts(value), [place, *found.values()]):
        return _written_as_one_text(other)
    if own in ("messages", "conversations"):
        found["prompt"] = found.pop(own)
    named = [name for key in form.others for name in key.split("|") if name in answers]
    found[named[0] if named else "response"] = place
    return f"; name it, as in --columns {written(found)}"


def _as_one_text(texts: Mapping[str, str], places: Iterable[str]) -> str | None:
    """The first of some places that holds a conversation in one text."""
    return next((place for place in places if _is_conversation(texts.get(place))), None)


def _written_as_one_text(place: str) -> str:
    return (
        f"; {key_name(place)} is a conversation as one text, whose turns belong in a list of "
        "messages"
    )


def written(columns: Mapping[str, str]) -> str:
    """Columns as a shell takes them."""
    plain = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
    odd = [one for one in columns.values() if one != one.strip() or re.search(r"[,={]", one)]
    if not odd and plain.isprintable():
        return shlex.quote(plain) if re.search(r"[\s;&|<>()$`\"'*?#!\\]", plain) else plain
    return shlex.quote(json.dumps(columns))


def is_message(value: Any) -> bool:
    """Whether it is one message of a conversation."""
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    said = [key for key in ("content", "value", "text") if isinstance(value.get(key), str)]
    return isinstance(role, str) and role.lower() in _ROLES and bool(said)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) for i in value)


def _is_conversation(text: Any) -> bool:
    """Whether a text is a conversation, with an answer in it."""
    return bool(isinstance(text, str) and _BEGINS.match(text) and _ANSWERS_THERE.search(text))


def _has_answer(value: Mapping[str, Any], form: _Form, answers: Sequence[str]) -> bool:
    names = {name for key in (*form.keys, *form.others) for name in key.split("|")} & {*answers}
    return all(key in value for key in form.keys) and any(value.get(name) for name in names)


def _named(value: Mapping[str, Any], keys: Mapping[str, str], form: _Form) -> dict[str, str]:
    """What a form reads of a row, by our names; of alternatives the first."""
    found = {}
    for alternatives in (*form.keys, *form.others):
        name = next((n for n in alternatives.split("|") if n in keys), None)
        if name is not None:
            found[name] = keys[name]
    return {**found, **_beside(value, found)} if "system" in "".join(form.others) else found


def _beside(value: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, str]:
    """System message and tools, which a mapped row has only where they are named."""
    beside = {}
    for ours, names in _BESIDE.items():
        theirs = next((key for key in value if key.strip().lower() in names and value[key]), None)
        if theirs is not None and not {ours, *names} & {*found}:
            beside[ours] = theirs
    return beside


def _in_other_letters(
    value: Mapping[str, Any], forms: Sequence[_Form], answers: Sequence[str]
) -> dict[str, str]:
    """The columns of a row whose keys are a form's but for capitals and spaces."""
    keys = {key.strip().lower(): key for key in value}
    folded = {key: value[theirs] for key, theirs in keys.items()}
    form = next((form for form in forms if _has_answer(folded, form, answers)), None)
    return _named(value, keys, form) if form else {}


def _of_lists(value: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a row that holds a list of messages."""
    for place, given in _places(value):
        item = from_json(given)
        inner = _of_messages(item)
        if inner is not None and (item is given or not inner):  # JSON text, as in a table
            beside = _beside(value, inner)
            if str(item[0].get(inner.get("role", "role"))).lower() == "system":
                beside.pop("system", None)
            return {"messages": place, **inner, **beside}
    return {}


def _of_texts(value: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a row that holds a question and an answer, or such in turns."""
    texts = list(_texts(value))
    second = _likeliest(texts, _RESPONSES)
    if second is None or not second.lower().startswith("target"):
        texts = [place for place in texts if place.lower() != "source"]  # where a row comes from
    first = _likeliest(texts, _QUESTIONS)
    if first is None and second is None:
        several = [place for place, item in _places(value) if _is_texts(item)]
        if several:
            return {"conversations": several[0]}
    if first is not None and second is None:
        second = _first_of_several(value)
    if first is None and second is None and len(texts) == 2:
        first, second = texts
    elif len(texts) == 2 and None in (first, second):
        other = next(place for place in texts if place not in (first, second))
        first, second = first or other, second or other
    found = {"prompt": first or "QUESTION", "response": second or "ANSWER"}
    return {**found, **_beside(value, found)}


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    """Places of texts that a question or an answer may be."""
    beside = {name for names in _BESIDE.values() for name in names}
    return {
        place: item
        for place, item in _places(value)
        if isinstance(item, str) and place.strip().lower() not in beside
    }


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(i, str) for i in value)


def _first_of_several(value: Mapping[str, Any]) -> str | None:
    """The first of a list of texts that is called as an answer is."""
    lists = [
        place
        for place, item in _places(value)
        if isinstance(item, list) and item and isinstance(item[0], str)
    ]
    place = _likeliest(lists, _RESPONSES)
    return f"{place}.0" if place else None


def _places(value: Mapping[str, Any], depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Each key that may be learnt from, with its value; nested ones by a dot."""
    for key, item in value.items():
        if any(word in str(key).lower() for word in _UNWANTED):
            continue
        if isinstance(item, dict) and depth:
            yield from ((f"{key}.{inner}", v) for inner, v in _places(item, depth - 1))
        else:
            yield str(key), item


def _likeliest(places: Sequence[str], names: Sequence[str]) -> str | None:
    """The place that is called, or else partly called, by the first of some names."""
    own = {place: _called(place) for place in places}
    for fits in (str.__eq__, str.endswith):
        for name in names:
            found = (p for p, called in own.items() if any(fits(one, name) for one in called))
            if (place := next(found, None)) is not None:
                return place
    return None


def _called(place: str) -> list[str]:
    """The last key of a place, and the one before it where the last says that it is a text."""
    *before, last = place.strip().lower().split(".")
    return [last, *before[-1:]] if last in _SAID else [last]


def _of_messages(value: Any) -> dict[str, str] | None:
    """How the keys of a list of messages are to be mapped; None: it is no such list."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    texts = {k: part for k, part in value[0].items() if isinstance(part, str) or _is_parts(part)}
    role = next((k for k, part in texts.items() if str(part).lower() in _ROLES), None)
    said = _likeliest([key for key in texts if key != role], _SAID)
    if role is None or said is None or _answers_alone(value):
        return None
    wanted = {"role": role, "content": said}
    known = {"role": ("role", "from"), "content": ("content", "value")}
    return {ours: theirs for ours, theirs in wanted.items() if theirs not in known[ours]}


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value)
    )


def _answers_alone(value: Any) -> bool:
    """Whether it is a list of messages that are all the assistant's."""
    return _is_rows(value) and all(
        str(item.get("role", item.get("from"))).lower() in _ANSWERING for item in value
    )

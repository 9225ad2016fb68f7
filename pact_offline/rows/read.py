"""Rows of chat data, and the token contexts they become.

A row comes in one of three forms:

- ``{"messages": [{"role": ..., "content": ...}, ..., {"role": "assistant", "content": ...}]}``
- ``{"prompt": ..., "response": ...}``
- ``{"instruction": ..., "input": ..., "output": ...}`` (the user turn is instruction, one space,
  input; ``input`` may be missing or empty)

Rows are read from JSON-lines files, Parquet files, or a hub dataset (``hub:NAME`` or
``hub:NAME:SPLIT``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, first_line
from pact_offline.files import read_json_lines, require_file

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One conversation; the last message, if the assistant's, is the response.

    Attributes:
        prompt: messages before the response.
        response: the assistant's text, or None in a file of prompts.
        origin: file and line, for messages.
    """

    prompt: tuple[Message, ...]
    response: str | None
    origin: str


def _text(value: Any, key: str, origin: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{origin}: {key}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: {key}: expected Unicode text, found half a surrogate pair at character "
            f"{error.start}"
        ) from None
    return value


def _parse_messages(value: Any, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{origin}: messages: expected a list of messages, found {value!r:.60}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(
                f"{origin}: messages[{index}]: expected role and content, found {message!r:.60}"
            )
        parts = {
            key: _text(message.get(key), f"messages[{index}].{key}", origin)
            for key in ("role", "content")
        }
        messages.append(parts)
    return tuple(messages)


def parse_row(value: Any, origin: str, *, needs_response: bool = True) -> Row:
    """Read one row in any of the three forms.

    Raises:
        InputError: names `origin`, the key, what was expected and what was found.
    """
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected an object, found {type(value).__name__}")
    response: str | None
    if "messages" in value:
        messages = _parse_messages(value["messages"], origin)
        prompt, response = messages, None
        if messages[-1]["role"] == "assistant":
            prompt, response = messages[:-1], messages[-1]["content"]
        response_key = "messages"
    elif "prompt" in value:
        text = _text(value["prompt"], "prompt", origin)
        prompt, response_key = ({"role": "user", "content": text},), "response"
        response = value.get("response")
    elif "instruction" in value:
        text = _text(value["instruction"], "instruction", origin)
        if extra := _text(value.get("input") or "", "input", origin):
            text = f"{text} {extra}"
        prompt, response_key = ({"role": "user", "content": text},), "output"
        response = value.get("output")
    else:
        raise InputError(
            f"{origin}: expected the key messages, prompt or instruction, "
            f"found {', '.join(map(str, value)) or 'no key'}"
        )
    if not prompt or not any(message["content"].strip() for message in prompt):
        raise InputError(f"{origin}: expected a prompt, found none")
    if response is not None:
        response = _text(response, response_key, origin)
    if needs_response and not (response and response.strip()):
        raise InputError(f"{origin}: {response_key}: expected a response, found none")
    return Row(prompt, response or None, origin)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    is_empty = True
    for number, value in read_json_lines(path):
        is_empty = False
        yield f"{path}:{number}", value
    if is_empty:
        raise InputError(f"{path}: expected one JSON object a line, found an empty file")


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        if source.startswith("hub:"):
            name, _, split = source.removeprefix("hub:").partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
        else:
            rows = datasets.Dataset.from_parquet(source)
    except Exception as error:
        raise InputError(f"{source}: cannot be read as a dataset: {first_line(error)}") from None
    for index, row in enumerate(rows):
        yield f"{source}:{index + 1}", {key: value for key, value in row.items() if value}


def read_rows(source: str | Path, *, needs_response: bool = True) -> list[Row]:
    """All rows of one source, in order.

    Raises:
        MissingFileError, InputError: names file and line.
    """
    name = str(source)
    if name.startswith("hub:"):
        values = _dataset_rows(name)
    elif Path(name).suffix == ".parquet":
        require_file(Path(name))
        values = _dataset_rows(name)
    else:
        values = _json_lines(Path(name))
    return [parse_row(value, origin, needs_response=needs_response) for origin, value in values]


def read_all_rows(sources: Iterable[str | Path], *, needs_response: bool = True) -> list[Row]:
    """Rows of several sources, one after the other."""
    return [row for source in sources for row in read_rows(source, needs_response=needs_response)]

"""Values of a row, read or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pact_offline.errors import InputError


def text_of(value: Any, key: str, origin: str) -> str:
    """A text, or the texts of a list of parts, joined.

    Raises:
        InputError: neither.
    """
    if isinstance(value, list):
        return "".join(_part(part, f"{key}[{i}]", origin) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise InputError(f"{origin}: {key}: expected text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: {key}: expected Unicode text, found half a surrogate pair at character "
            f"{error.start}"
        ) from None
    return value


def category_of(value: Mapping[str, Any], key: str = "category") -> str | None:
    """The category that a prompt has in its set; None where it has none in words."""
    found = value.get(key)
    if not isinstance(found, str):
        return None
    return found.encode("utf-8", "replace").decode().strip() or None


def require_unicode(value: Any, key: str, origin: str) -> Any:
    """A value that goes to the chat template as it is, if all its text can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{origin}: {key}: expected Unicode text, found half a surrogate pair"
        ) from None
    except RecursionError:
        raise InputError(f"{origin}: {key}: expected a value, found deeply nested JSON") from None
    return value


def _part(part: Any, key: str, origin: str) -> str:
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise InputError(f"{origin}: {key}: expected a part of text, found {kind!r:.60}")
        if part.get("text") is None:
            raise InputError(
                f"{origin}: {key}: expected a part of text, found the keys {key_names(part)}"
            )
        part = part["text"]
    if not isinstance(part, str):
        raise InputError(f"{origin}: {key}: expected text, found {shown(part)}")
    return text_of(part, key, origin)


def from_json(value: Any) -> Any:
    """What a JSON text of an object or a list stands for; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def shown(value: Any) -> str:
    if isinstance(value, str | int | float | bool):
        return repr(value)[:60]
    return type(value).__name__


def key_names(keys: Iterable[Any]) -> str:
    return ", ".join(map(key_name, keys)) or "no key"


def key_name(key: Any) -> str:
    """A key in one line of text that can be written."""
    text = str(key)
    return text if text.isprintable() else repr(text)

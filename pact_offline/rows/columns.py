"""Rows whose keys have other names than ours."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from pact_offline.errors import InputError
from pact_offline.rows.values import key_name, key_names

_MISSING = object()


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


def written(columns: Mapping[str, str]) -> str:
    """Columns as a shell takes them."""
    plain = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
    odd = [one for one in columns.values() if one != one.strip() or re.search(r"[,={]", one)]
    if not odd and plain.isprintable():
        return shlex.quote(plain) if re.search(r"[\s;&|<>()$`\"'*?#!\\]", plain) else plain
    return shlex.quote(json.dumps(columns))


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

"""Tools and their calls as chat templates read them, however a row writes them."""

from __future__ import annotations

from typing import Any

from pact_offline.errors import InputError
from pact_offline.rows.values import from_json, key_names, require_unicode, shown

_ARGUMENTS = ("arguments", "parameters", "args", "input")  # what they are called
_IDS = ("id", "call_id")  # beside the name in a call that is written without its wrapping
_NOT_THE_FUNCTIONS = (*_IDS, "type", "index")


def calls_of(value: Any, place: str, origin: str) -> list[dict[str, Any]]:
    """Calls of tools, each below `function`: the arguments an object, not its JSON text.

    Args:
        value: a call, a list of calls, or the JSON text of either.
        place: the key that it stands under.
        origin: file and line.

    Raises:
        InputError: something is no call, or has no arguments but other keys that may be meant.
    """
    calls = from_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    found = [_call(call, f"{origin}: {place}[{index}]") for index, call in enumerate(calls)]
    require_unicode(found, place, origin)
    return found


def _call(call: Any, place: str) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(f"{place}: expected a call with name and arguments, found {shown(call)}")
    outer, inner = _there(call), _there(inner)
    if "function" not in outer:
        outer = {key: part for key, part in outer.items() if key in _IDS}
        inner = {key: part for key, part in inner.items() if key not in _NOT_THE_FUNCTIONS}
    named = next((key for key in _ARGUMENTS if key in inner), None)
    others = [key for key, part in inner.items() if isinstance(from_json(part), dict | list)]
    if named is None and others:
        raise InputError(
            f"{place}: expected the arguments of a call, found the keys "
            f"{key_names(['name', *others])}"
        )
    function = {"name": inner["name"]}
    function |= {key: part for key, part in inner.items() if key not in _ARGUMENTS}
    function["arguments"] = from_json(inner[named] or {}) if named else {}
    return {"type": "function", **outer, "function": function}


def _there(value: dict[str, Any]) -> dict[str, Any]:
    """What is not null, which counts as not there."""
    return {key: part for key, part in value.items() if part is not None}


def tool_of(tool: Any) -> Any:
    """A tool below `function`, also where it is written without; anything else as it is."""
    tool = from_json(tool)
    if not isinstance(tool, dict) or "function" in tool or "name" not in tool:
        return tool
    inner = {key: part for key, part in tool.items() if key != "type" or part != "function"}
    return {"type": "function", "function": inner}

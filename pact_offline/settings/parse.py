"""Checking settings: unknown keys and bad values are refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)

from pact_offline.errors import SettingError

S = TypeVar("S", bound=BaseModel)


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _describe(problem: Any, source: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind, message, found = problem["type"], problem["msg"], problem.get("input")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{source}: {key + ': ' if key else ''}{text}"
    if kind == "extra_forbidden":
        return f"{source}: {key}: unknown key (value {json.dumps(found, default=str)[:60]})"
    if kind == "missing":
        return f"{source}: {key}: required key is missing"
    expected = message.replace("Input should be ", "").replace("Input should ", "")
    return f"{source}: {key}: expected {expected}, found {json.dumps(found, default=str)[:60]}"


def parse_settings(cls: type[S], values: Mapping[str, Any], source: str) -> S:
    """Check `values` against `cls`.

    Raises:
        SettingError: one line that names source, key, what was expected and what was found.
    """
    try:
        return cls.model_validate(dict(values))
    except SettingError as error:
        raise SettingError(f"{source}: {error}") from None
    except ValidationError as error:
        raise SettingError(_describe(error.errors()[0], source)) from None

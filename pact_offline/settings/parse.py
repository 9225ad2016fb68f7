"""Checking settings: unknown keys and bad values are refused by name."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pact_offline.errors import SettingError
from pact_offline.files import is_text

S = TypeVar("S", bound=BaseModel)


_LARGEST = 2**32 - 1  # what every library takes, as a seed or a size


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys, numbers without end, and text that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean for a number, as which pydantic takes it."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"expected a number, found {_shown(value)}")
        return value

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and item > _LARGEST:
                raise ValueError(f"expected at most {_LARGEST}, found {_shown(item)}")
            if isinstance(item, str) and not is_text(item):
                raise ValueError(f"expected Unicode text without NUL, found {_shown(item)}")
        return value


def of_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back.

    Raises:
        ValueError: JSON has no such value.
    """
    try:
        return dict(json.loads(json.dumps(values, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("expected values as JSON has them; put a date in quotes") from None


def _shown(value: Any) -> str:
    """The start of a value as JSON; of one that aliases make endless or huge, some of it."""
    try:
        is_plain = value is None or isinstance(value, str | int | float)
        return json.dumps(value)[:60] if is_plain else reprlib.repr(value)[:60]
    except ValueError:
        return "a number of very many digits"


def _describe(problem: Any, source: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind, message, found = problem["type"], problem["msg"], problem.get("input")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{source}: {key + ': ' if key else ''}{text}"
    if kind == "extra_forbidden":
        return f"{source}: {key}: unknown key (value {_shown(found)})"
    if kind == "missing":
        return f"{source}: {key}: required key is missing"
    expected = message.replace("Input should be ", "").replace("Input should ", "")
    return f"{source}: {key}: expected {expected}, found {_shown(found)}"


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

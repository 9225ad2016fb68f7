"""Options that many commands share."""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation.published_sets import PUBLISHED_SETS
from pact_offline.files import (
    check_output_folder,
    parse_json,
    read_yaml,
    require_file_place,
    status_of,
)
from pact_offline.settings.parse import parse_settings

S = TypeVar("S", bound=BaseModel)
F = TypeVar("F", bound=Callable[..., Any])


class Place(click.Path):
    """A path that the system can take, checked before any work.

    Places to write are looked at here, because a command writes them at its end.
    """

    def __init__(self, name: str, check: Callable[[Path], object] = status_of) -> None:
        super().__init__(path_type=Path)
        self.name, self._check = name, check

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        text = _given(value, param)
        if "://" in text:
            raise InputError(f"{text:.200}: expected a path on this machine, found a URL")
        path = Path(text)
        self._check(path)
        return path


class Name(click.Path):
    """What may be a path, or a name or URL of the network; it stays text."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        text = _given(value, param)
        if "://" not in text and not text.startswith("hub:"):
            status_of(Path(text))
        return text


class Number(click.FloatRange):
    """A number in a range; no NaN, which lies in every one."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r:.40} is not a number.", param, ctx)
        return float(found)


def _given(value: Any, param: click.Parameter | None) -> str:
    text = str(value)
    if not text.strip():
        raise InputError(f"{param.opts[0] if param else ''}: expected a name, found nothing")
    return text


FILE = Place("file")
FOLDER = Place("folder")
OUTPUT_FILE = Place("file", require_file_place)
OUTPUT_FOLDER = Place("folder", check_output_folder)
MODEL = Name("model")
ROWS = Name("rows")
STORES = Name("place")

ROW_SOURCES = (
    "JSON lines, a JSON array, CSV, Parquet or Arrow, also .gz or .zst, or "
    "hub:NAME[:CONFIG[:SPLIT]][@REVISION] of the Hugging Face hub"
)
rows_option = click.option(
    "--rows",
    type=ROWS,
    multiple=True,
    required=True,
    help=f"Rows: {ROW_SOURCES}; may be repeated. Each row has messages, or conversations; or "
    "prompt and response or completion; instruction and output; question and answer; input and "
    "output; or what --columns names.",
)


def prompts_option(name: str, description: str) -> Callable[[F], F]:
    return click.option(f"--{name}", type=ROWS, help=f"{description}: {ROW_SOURCES}.")


def prompt_options(command: F) -> F:
    """`--harmful`, `--borderline`, `--benign`, `--task` and `--set`, which comes as `sets`."""
    for option in reversed(
        (
            prompts_option("harmful", "Held-out harmful prompts"),
            prompts_option("borderline", "Benign prompts that look harmful"),
            prompts_option("benign", "Plain benign prompts"),
            prompts_option("task", "Test rows of the task, with their right responses"),
            click.option(
                "--set",
                "sets",
                multiple=True,
                metavar="NAME[:KIND][=SOURCE]",
                help=f"A further set of prompts; may be repeated. A published one by its name "
                f"({', '.join(PUBLISHED_SETS)}), from the hub or from =FILE as its repository "
                "ships it; your own as NAME:refuse=FILE, NAME:answer=FILE or NAME:task=FILE.",
            ),
        )
    ):
        command = option(command)
    return command


safety_tokens_option = click.option(
    "--safety-tokens",
    type=FILE,
    required=True,
    help="safety_tokens.json from `pact-offline tokens`.",
)
cache_option = click.option(
    "--cache",
    help="Cache of the targets; needed where it is a URL, which a file alone never opens.",
)


def adapter_option(of: str) -> Callable[[F], F]:
    """`--adapter`, a part of the model that the option `of` names: MODEL+ADAPTER."""

    def decorate(command: F) -> F:
        @click.option(
            "--adapter",
            type=FOLDER,
            help=f"LoRA adapter that is part of the model; the same as --{of} MODEL+ADAPTER.",
        )
        @functools.wraps(command)
        def run(*args: Any, adapter: Path | None, **kwargs: Any) -> Any:
            if adapter is not None:
                kwargs[of] = f"{kwargs[of]}+{adapter}"
            return command(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


def _option_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _option_type(next(a for a in typing.get_args(annotation) if a is not type(None)))
    return {int: int, float: float, bool: bool}.get(annotation, str)


def _metavar(annotation: Any) -> str | None:
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is tuple:
        return "N,..." if parts[0] in (int, float) else "NAME,..."
    return "KEY=VALUE,..." if kind is dict else None


def _mapping(text: str, option: str, of_text: bool) -> dict[str, Any]:
    """Keys and values: as JSON, or parted by commas, where true, false and numbers are such."""
    if text.strip().startswith("{"):
        value = parse_json(text, option, SettingError)
        return {str(key): item for key, item in value.items()}
    found: dict[str, Any] = {}
    for part in filter(str.strip, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise SettingError(f"{option}: expected KEY=VALUE,..., found {part!r:.60}")
        found[key.strip()] = value.strip()
        if not of_text:
            with suppress(ValueError, RecursionError):
                found[key.strip()] = json.loads(value)
    return found


def settings_options(cls: type[S]) -> Callable[[F], F]:
    """Options for every field of a settings class, and `--config FILE` for all at once.

    The command gets one argument, `settings`. Options win over the file, the file over defaults.
    """

    def decorate(command: F) -> F:
        def run(*args: Any, config: Path | None, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in cls.model_fields}
            given = {name: value for name, value in given.items() if value is not None}
            for name, value in given.items():
                kind = typing.get_origin(cls.model_fields[name].annotation)
                if kind is tuple:
                    given[name] = tuple(map(str.strip, value.split(","))) if value.strip() else ()
                elif kind is dict:
                    of_text = typing.get_args(cls.model_fields[name].annotation)[1] is str
                    given[name] = _mapping(value, f"--{name.replace('_', '-')}", of_text)
            values = read_yaml(config) if config else {}
            parse_settings(cls, values, str(config))
            settings = parse_settings(cls, {**values, **given}, "options")
            return command(*args, settings=settings, **kwargs)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for name, info in reversed(cls.model_fields.items()):
            option, is_flag = name.replace("_", "-"), info.annotation is bool
            default = None if info.default is PydanticUndefined else info.default
            if is_flag:
                default = option if default else f"no-{option}"
            elif isinstance(default, tuple):
                default = ",".join(map(str, default))
            shown = "" if default in (None, "", {}) else f"  [default: {default}]"
            run = click.option(
                f"--{option}/--no-{option}" if is_flag else f"--{option}",
                name,
                type=_option_type(info.annotation),
                metavar=_metavar(info.annotation),
                default=None,  # what the settings or --config say
                help=f"{info.description}{shown}",
            )(run)
        config_option = click.option(
            "--config",
            type=FILE,
            help="YAML file with any of the settings below, as max_tokens for --max-tokens.",
        )
        return typing.cast("F", config_option(run))

    return decorate


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )

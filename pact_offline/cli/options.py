"""Options that many commands share."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from pact_offline.files import read_yaml
from pact_offline.settings.parse import parse_settings

S = TypeVar("S", bound=BaseModel)
F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)

rows_option = click.option(
    "--rows", type=str, multiple=True, required=True, help="Row file; may be repeated."
)
safety_tokens_option = click.option(
    "--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`."
)
cache_option = click.option(
    "--cache",
    help="Cache of the targets; needed where it is a URL, which a file alone never opens.",
)


def _option_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _option_type(next(a for a in typing.get_args(annotation) if a is not type(None)))
    return {int: int, float: float, bool: bool}.get(annotation, str)


def settings_options(cls: type[S]) -> Callable[[F], F]:
    """Options for every field of a settings class, and `--config FILE` for all at once.

    The command gets one argument, `settings`. Options win over the file, the file over defaults.
    """

    def decorate(command: F) -> F:
        def run(*args: Any, config: Path | None, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in cls.model_fields}
            given = {name: value for name, value in given.items() if value is not None}
            for name, value in given.items():
                if typing.get_origin(cls.model_fields[name].annotation) is tuple:
                    given[name] = tuple(value.split(","))
            values = read_yaml(config) if config else {}
            parse_settings(cls, values, str(config))
            settings = parse_settings(cls, {**values, **given}, "options")
            return command(*args, settings=settings, **kwargs)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for name, info in reversed(cls.model_fields.items()):
            default = info.default
            if isinstance(default, tuple):
                default = ",".join(default)
            shown = "" if default in (None, "") else f"  [default: {default}]"
            run = click.option(
                f"--{name.replace('_', '-')}",
                name,
                type=_option_type(info.annotation),
                default=None,
                help=f"{info.description}{shown}",
            )(run)
        config_option = click.option(
            "--config", type=FILE, help="YAML file with any of the settings below."
        )
        return typing.cast("F", config_option(run))

    return decorate


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )

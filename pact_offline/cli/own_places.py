"""No command writes over what it reads."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pact_offline.cli.options import MODEL, OUTPUT_FILE, OUTPUT_FOLDER, Name, Place
from pact_offline.errors import SettingError

_FILES = ("chat_template", "endpoint_prompt", "guard", "lm_eval_include")  # settings that name one
_CODE = ("objective", "judge", "rates")  # FILE:FUNCTION


def with_own_places(command: click.Command) -> click.Command:
    """A command, and those below it, that refuses an output which is one of its inputs."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            with_own_places(inner)
    elif run := command.callback:

        @functools.wraps(run)
        def checked(*args: Any, **kwargs: Any) -> Any:
            _require_own_places(click.get_current_context())
            return run(*args, **kwargs)

        command.callback = checked
    return command


def _require_own_places(ctx: click.Context) -> None:
    inputs = {place: option for option, place in _inputs(ctx)}
    for param, output, place in _outputs(ctx):
        read = inputs.get(place)
        if read is None and param.name == "output" and param.type is OUTPUT_FOLDER:
            # An earlier output is replaced whole.
            read = next((inputs[one] for one in inputs if place in one.parents), None)
        if read is not None:
            raise SettingError(
                f"{param.opts[0]}: expected a place of its own, found {output}, which {read} reads"
            )


def _outputs(ctx: click.Context) -> Iterator[tuple[click.Parameter, str, Path]]:
    """What a command writes: the option, what it names, and where that is."""
    for param in ctx.command.params:
        if param.type in (OUTPUT_FILE, OUTPUT_FOLDER):
            for output in _values(ctx, param):
                yield param, str(output), _real(output)
                if ctx.info_name == "rehearse":
                    from pact_offline.cache.targets import answers_place

                    answers = answers_place(output)
                    yield param, str(output), _real(answers)
                    yield param, str(output), _real(answers.with_suffix(".json"))


def _inputs(ctx: click.Context) -> Iterator[tuple[str, Path]]:
    """What a command reads, of what is there, and which option names it."""
    for param in ctx.command.params:
        name = param.opts[0] if isinstance(param, click.Option) else param.make_metavar(ctx)
        for value in _values(ctx, param):
            for place in _places(param, str(value)):
                if os.path.lexists(place):  # any other is a name of the hub
                    yield name, _real(place)


def _places(param: click.Parameter, value: str) -> Iterator[str | Path]:
    if param.type in (OUTPUT_FILE, OUTPUT_FOLDER) or value.startswith("hub:"):
        return
    if param.name == "sets":
        yield from value.partition("=")[2:]
    elif param.name in _CODE:
        yield from (one.strip().rpartition(":")[0] for one in value.split(","))
    elif param.name in _FILES or isinstance(param.type, Place | Name):
        yield value
        if param.type is MODEL:
            yield from value.rpartition("+")[::2]
        if param.name == "metrics":
            yield Path(value).with_name("answers.jsonl")


def _values(ctx: click.Context, param: click.Parameter) -> tuple[Any, ...]:
    value = ctx.params.get(param.name or "")
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _real(place: str | Path) -> Path:
    return Path(os.path.realpath(place))

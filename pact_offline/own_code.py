"""Functions of a user's own: `path/to/file.py:function`, or the name of an entry point.

Nothing is imported until it is loaded, and only what the user has named.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from pact_offline.errors import InputError, SettingError, first_line
from pact_offline.files import require_file, sha256_file

Kind = Literal["objective", "judge", "rate"]


def _group(kind: Kind) -> str:
    return f"pact_offline.{kind}s"


def _option(kind: Kind) -> str:
    return "--rates" if kind == "rate" else f"--{kind}"


def _in_file(name: str) -> tuple[Path, str] | None:
    """The file and function of `file.py:function`; None for any other name."""
    file, _, function = name.rpartition(":")
    return (Path(file), function) if file.endswith(".py") and function.isidentifier() else None


def file_of(name: str) -> Path | None:
    """The file of `file.py:function`; None for any other name."""
    found = _in_file(name)
    return found and found[0]


def _entry_point(kind: Kind, name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=_group(kind), name=name)), None)


def is_own(kind: Kind, name: str) -> bool:
    """Whether a name is of the form `file.py:function`, or an installed entry point's."""
    return _in_file(name) is not None or _entry_point(kind, name) is not None


def installed_names(kind: Kind) -> list[str]:
    """Names of the installed entry points."""
    return sorted({point.name for point in entry_points(group=_group(kind))})


def content_of(kind: Kind, name: str) -> str | None:
    """What fixes a function: its file's SHA-256, or its package and version; None if it is ours.

    Raises:
        MissingFileError, InputError: no such file.
    """
    if found := _in_file(name):
        require_file(found[0])
        return sha256_file(found[0])
    point = _entry_point(kind, name)
    return None if point is None else f"{point.value} {getattr(point.dist, 'version', '')}".strip()


def load(kind: Kind, name: str) -> Callable[..., Any]:
    """Import the function that a name stands for.

    Raises:
        MissingFileError, InputError: no such file.
        SettingError: no such entry point or function, or its module cannot be imported.
    """
    found = _in_file(name)
    if found:
        require_file(found[0])
    try:
        if found:
            file, function = found
            spec = importlib.util.spec_from_file_location(f"pact_offline_own_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made = getattr(module, function, None)
        else:
            point = _entry_point(kind, name)
            made = point.load() if point else None
    except Exception as error:  # whatever a user's module raises
        raise SettingError(
            f"{_option(kind)} {name}: cannot be imported: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not callable(made):
        raise SettingError(f"{_option(kind)}: expected a function, found none by the name {name!r}")
    return cast("Callable[..., Any]", made)


def load_verdict(kind: Kind, name: str, arguments: Sequence[str]) -> Callable[..., bool]:
    """`load` a function of texts that says yes or no.

    Returns:
        the function, with its attributes; it raises `InputError` where the user's fails, or says
        anything but True or False.

    Raises:
        MissingFileError, SettingError: as of `load`, or it takes other arguments.
    """
    function, what = load(kind, name), f"{_option(kind)} {name}"
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{what}: expected a function of {', '.join(arguments)}, found: {error}"
        ) from None

    @functools.wraps(function)
    def checked(*texts: str | None) -> bool:
        try:
            verdict = function(*texts)
        except Exception as error:  # whatever a user's function raises
            raise InputError(
                f"{what}: failed on the prompt {texts[0]!r:.60}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(verdict, bool | np.bool_):
            raise InputError(
                f"{what}: expected True or False, found {verdict!r:.40} on the prompt "
                f"{texts[0]!r:.60}"
            )
        return bool(verdict)

    return checked

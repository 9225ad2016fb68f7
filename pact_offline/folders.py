"""An output directory that is written whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pact_offline.errors import InputError, PactError, first_line
from pact_offline.files import check_output_folder, status_of

RUN_FILE = "pact_offline.json"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder of which nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def require_place(output: Path, mark: str = RUN_FILE) -> Path:
    """Refuse a place where no output directory can be put.

    Args:
        output: the directory.
        mark: the file that tells an earlier output, which is replaced.

    Returns:
        where it really is, links followed.

    Raises:
        InputError: it is a file, lies in one, holds something that this project did not write, or
            is the current directory or one above it.
    """
    check_output_folder(output)
    place = Path(os.path.realpath(output))
    status_of(_aside(place))  # the name of what is beside it may be too long
    try:
        is_around_us = place in (Path.cwd(), *Path.cwd().parents)
        is_taken = _is_foreign(place, mark)
    except OSError as error:
        raise InputError(f"{output}: cannot be used: {error.strerror}") from None
    if is_around_us:
        raise InputError(
            f"{output}: expected a directory of the output's own, found the current directory or "
            "one above it"
        )
    if is_taken:
        raise InputError(
            f"{output}: expected an empty or earlier output directory, found other files"
        )
    return place


@contextmanager
def output_aside(output: Path, mark: str = RUN_FILE) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its place when the block ends well.

    An earlier output stays until the new one is whole; where a job is killed between the two, the
    next one puts it back.

    Args:
        output: the directory.
        mark: the file that tells an earlier output, which is replaced.

    Raises:
        InputError: as of `require_place`, or the place cannot be written to.
    """
    place = require_place(output, mark)
    machine, aside = _machine(), _aside(place)
    try:
        _tidy(place)
        for left in _beside(place, f"{machine}.*.partial"):
            pid = left.name.split(".")[-2]
            if pid == str(os.getpid()) or not _is_running(pid):
                shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        with kept_if_it_fails(aside, output):
            _put_in_place(aside, place)
    except OSError as error:
        if isinstance(error, PactError):
            raise
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def kept_if_it_fails(aside: Path, output: Path) -> Iterator[None]:
    """What an `output_aside` holds is left beside the output if the block fails: it took long.

    Raises:
        InputError: it did; names the folder.
    """
    try:
        yield
    except Exception as error:
        kept = _keep(aside, output)
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise InputError(
            f"{output}: cannot be saved: {reason}; what there is of it is in {kept}"
        ) from error


def _keep(aside: Path, output: Path) -> Path:
    """Move a folder to where nothing removes it: beside the output, or among temporary files."""
    place = Path(os.path.realpath(output))
    names = (place.with_name(f"{place.name}.unsaved{number or ''}") for number in range(1000))
    kept = next(name for name in names if not name.exists())
    try:
        aside.rename(kept)
    except OSError:
        kept = Path(tempfile.mkdtemp(prefix=f"{place.name}.unsaved."))
        shutil.copytree(aside, kept, dirs_exist_ok=True)
    return kept


def _machine() -> str:
    return platform.node() or "here"


def _aside(place: Path) -> Path:
    """Where this process makes an output, before it takes its place."""
    return place.with_name(f".{place.name}.{_machine()}.{os.getpid()}.partial")


def _beside(place: Path, rest: str) -> list[Path]:
    return [*place.parent.glob(f".{glob.escape(place.name)}.{rest}")]


def _name_beside(place: Path, end: str) -> Path:
    """A name that nobody has used: who saw a folder there may drop it at any later time."""
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.{end}")


def _put_in_place(aside: Path, place: Path, attempts: int = 50) -> None:
    old = _name_beside(place, "replaced")
    with suppress(FileNotFoundError):
        place.rename(old)
    try:
        aside.rename(place)
    except OSError:
        if attempts == 1 or not place.exists():
            raise
        _put_in_place(aside, place, attempts - 1)  # another job has put its own there
    _drop(old, place)


def _tidy(place: Path) -> None:
    """Undo what a killed job left between its renames, and remove what it replaced."""
    replaced = _beside(place, "*.replaced")
    if replaced and not place.exists():
        with suppress(OSError):  # another job has done so, or has put its own there
            replaced.pop().rename(place)
    for old in replaced:
        _drop(old, place)
    for left in _beside(place, "*.dropped"):
        shutil.rmtree(left, ignore_errors=True)


def _drop(old: Path, place: Path) -> None:
    """Remove a folder under a name that is never put back: half of it may stay."""
    dropped = _name_beside(place, "dropped")
    with suppress(FileNotFoundError):
        old.rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        if os.name != "nt":  # where signal 0 is Ctrl-C
            os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass
    return True


def _is_foreign(folder: Path, mark: str) -> bool:
    """Whether a folder holds what is no output; each time that it is looked at.

    What another job is replacing just now may be gone, or half of it, while it is listed.
    """
    for _ in range(3):
        try:
            names = {entry.name for entry in folder.iterdir()}
        except FileNotFoundError:
            return False
        if not names or mark in names:
            return False
    return True

"""Reading files with errors of one line, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from pact_offline.errors import InputError, MissingFileError, PactError, first_line

_SETTLED_NS = 2_000_000_000


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there replaces `path` when the block ends well.

    Raises:
        InputError: the place cannot be written to.
    """
    path = Path(path)
    require_file_place(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        to_disk(aside)
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Make a file or folder outlive a power cut, where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_from_disk(path: Path) -> bytes:
    """A file's bytes, after it has gone to disk, and not from memory where the system can."""
    to_disk(path)
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a file system that cannot
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n",
            encoding="utf-8",
        )


def user_cache() -> Path:
    """Where what saves time, and never decides a value, is kept for this user."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "pact-offline"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits; errors as of `require_file`."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_text(value: str) -> bool:
    """Whether a text can be written to a file, and name one."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def status_of(path: Path) -> os.stat_result | None:
    """What the system says of a place; None where nothing is there.

    Raises:
        InputError: it says nothing: no permission, too long a name, a loop of links.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{_short(path)}: cannot be used: {error.strerror}") from None
    except ValueError as error:  # a NUL in it
        raise InputError(f"{_short(path)}: expected a path, found: {error}") from None


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"


def require_file_place(path: Path) -> None:
    """Refuse a place where no file could be written in the end.

    Raises:
        InputError: a directory or a device, a file among its parents, or nobody may write there.
    """
    found = status_of(path)
    if path.name in ("", "..") or (found and stat.S_ISDIR(found.st_mode)):
        raise InputError(f"{path}: expected a file to write, found a directory")
    if found and not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a file to write, found a pipe or a device")
    _check_parents(path)


def check_output_folder(path: Path) -> None:
    """Refuse a place where no directory could be made, or replaced, in the end.

    Raises:
        InputError: no name of its own, a file in its place or among its parents, or nobody may
            write there.
    """
    found = status_of(path)
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected a directory with a name of its own, to be replaced")
    if found and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: expected a directory to write, found a file")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    for parent in path.parents:
        if found := status_of(parent):
            if not stat.S_ISDIR(found.st_mode):
                raise InputError(f"{path}: expected a directory at {parent}, found a file")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise InputError(f"{path}: cannot be written: no permission in {parent}")
            return


def require_file(path: Path) -> None:
    """Refuse what is no file to read, before it is opened: a pipe would be waited on.

    Raises:
        MissingFileError: nothing is there.
        InputError: a directory, a pipe or a device.
    """
    found = status_of(path)
    if found is None:
        raise MissingFileError(f"{path}: no such file")
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: expected a file, found a directory")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a file, found a pipe or a device")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `MissingFileError` or `InputError` where there is none."""
    text = read_text(path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{path}:{line} expected YAML, found: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: expected keys and values, found deeply nested YAML") from None
    except Exception as error:  # of a value that is none of its kind, a date or a number
        raise InputError(f"{path}: expected YAML, found: {first_line(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: expected keys and values, found {found}")
    return values


def read_text(path: Path) -> str:
    """A file's text, less a byte order mark.

    Raises:
        MissingFileError, InputError: no file, not UTF-8, or not to be read.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.start} invalid") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(
    text: str | bytes, place: str, kind: type[PactError] = InputError, *, line: int | None = None
) -> Any:
    """The value of a JSON text.

    Args:
        text: the whole of it.
        place: file, for the message.
        kind: of the error.
        line: of the file, where the text is one line of it.

    Raises:
        PactError: of `kind`, in one line, where it is not JSON or not to be held.
    """
    here = f"{place}:{line}" if line else place
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if line:
            problem = f"{error.msg} at column {error.colno}"
            raise kind(f"{here}: expected a JSON object, found: {problem}") from None
        raise kind(f"{place}:{error.lineno}: expected JSON, found: {error.msg}") from None
    except RecursionError:
        what = "a row" if line else "a value"
        raise kind(f"{here}: expected {what}, found deeply nested JSON") from None
    except UnicodeDecodeError as error:
        raise kind(f"{here}: expected UTF-8 text, found byte {error.start} invalid") from None
    except ValueError:  # Python reads no number of more than some thousand digits
        raise kind(f"{here}: expected JSON, found a number of too many digits") from None


def read_json(path: Path, kind: type[PactError] = InputError) -> Any:
    """The value in a JSON file; `kind`, in one line with the file's, where it is not JSON."""
    return parse_json(read_text(path), str(path), kind)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the value of each line of JSON; blank lines are left out."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, str(path), line=number)


def remembered_checksum(file: Path) -> str:
    """SHA-256 of a file, remembered by its path and by what changes with its bytes.

    The time of the last change of its status is among that: nobody can set it back. What was
    changed a moment ago is not remembered, as it may change again within the same tick.
    """
    require_file(file)
    before = file.stat()
    changed = (before.st_size, before.st_ino, before.st_mtime_ns, before.st_ctime_ns)
    key = f"{file.resolve()}:{':'.join(map(str, changed))}"
    memory = user_cache() / "checksums.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if isinstance(known, dict) and isinstance(known.get(key), str):
            return str(known[key])
    except (OSError, ValueError, RecursionError):
        known = {}
    try:
        checksum = sha256_file(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if time.time_ns() - max(changed[2:]) < _SETTLED_NS:
        return checksum
    # A home directory that cannot be written to costs time, not truth.
    with contextlib.suppress(ValueError):
        write_json(memory, {**(known if isinstance(known, dict) else {}), key: checksum})
    return checksum

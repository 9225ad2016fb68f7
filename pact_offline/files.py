"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from pact_offline.errors import InputError, MissingFileError, PactError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there replaces `path` when the block ends well.

    Raises:
        InputError: the place cannot be written to.
    """
    path = Path(path)
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
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: expected keys and values, found {found}")
    return values


def read_text(path: Path) -> str:
    """A file's text, with one-line errors for what is missing, no file, or not UTF-8."""
    if not path.exists():
        raise MissingFileError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a directory")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.start} invalid") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path, kind: type[PactError] = InputError) -> Any:
    """The value in a JSON file; `kind`, in one line with the file's, where it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise kind(f"{path}:{error.lineno}: expected JSON, found: {error.msg}") from None
    except RecursionError:
        raise kind(f"{path}: expected JSON, found it too deeply nested") from None


def remembered_checksum(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and modification time."""
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    memory = user_cache() / "checksums.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if isinstance(known, dict) and isinstance(known.get(key), str):
            return str(known[key])
    except (OSError, ValueError):
        known = {}
    checksum = sha256_file(file)
    # A home directory that cannot be written to costs time, not truth.
    with contextlib.suppress(ValueError):
        write_json(memory, {**(known if isinstance(known, dict) else {}), key: checksum})
    return checksum

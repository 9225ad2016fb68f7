"""Writing files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError


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

"""Verdicts of judges that cost something, remembered by content: nothing is judged twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError
from pact_offline.files import require_file, user_cache


def verdict_key(*parts: Any) -> str:
    """SHA-256 over what decides a verdict, 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class KnownVerdicts:
    """What one judge replied, by key, in a file of the user's cache; added to as replies come.

    Several processes may add to one file: a line is written at once, and one that is not whole is
    left out. A cache that cannot be written to costs time, not truth.
    """

    def __init__(self, judge: str) -> None:
        """Args:
        judge: name of the file, made of letters, digits and hyphens.
        """
        self.path = user_cache() / "verdicts" / f"{judge}.jsonl"
        self._known = _replies(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> str:
        return self._known[key]

    def add(self, replies: Mapping[str, str]) -> None:
        """Remember replies, at once."""
        self._known |= replies
        text = "".join(json.dumps([key, reply]) + "\n" for key, reply in replies.items()).encode()
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a process was killed while it wrote
                        text = b"\n" + text
                file.write(text)


def _replies(path: Path) -> dict[str, str]:
    """The replies in a file, by key; a line that is not whole loses no other."""
    found: dict[str, str] = {}
    with suppress(InputError, OSError):
        require_file(path)
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    pair = json.loads(line.decode())
                    if isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)):
                        found[pair[0]] = pair[1]
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)

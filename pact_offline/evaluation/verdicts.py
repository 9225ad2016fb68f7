"""Verdicts of judges that cost something, remembered by content: nothing is judged twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pact_offline.errors import InputError, MissingFileError
from pact_offline.files import read_json_lines, user_cache


def verdict_key(*parts: Any) -> str:
    """SHA-256 over what decides a verdict, 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
        self._known: dict[str, str] = {}
        with suppress(MissingFileError, InputError):
            for _, line in read_json_lines(self.path):
                if isinstance(line, list) and len(line) == 2 and all(map(_is_text, line)):
                    self._known[line[0]] = line[1]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> str:
        return self._known[key]

    def add(self, replies: Mapping[str, str]) -> None:
        """Remember replies, at once."""
        self._known |= replies
        text = "".join(json.dumps([key, reply]) + "\n" for key, reply in replies.items())
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)

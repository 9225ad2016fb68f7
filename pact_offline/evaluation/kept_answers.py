"""Answers on disk as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pact_offline.errors import InputError, MissingFileError
from pact_offline.evaluation.attacks import Attack
from pact_offline.files import read_json_lines

_KEYS = {"prompts", "attack", "number", "answer"}  # of a line


class KeptAnswers:
    """Answers on disk as they come, so that a killed evaluation goes on from there.

    A file of JSON lines. Its first line says what the answers are of; a file of anything else is
    begun anew.
    """

    def __init__(
        self, decides: Any, *, folder: Path | None, evaluation: Path | None = None
    ) -> None:
        """Args:
        decides: all that decides the answers, as JSON; judges do not.
        folder: where the file is kept for good, by a name made of `decides`.
        evaluation: without a folder, the directory beside which the file lies until it is whole.
        """
        text = json.dumps(decides, sort_keys=True, default=str)
        self._of = hashlib.sha256(text.encode()).hexdigest()
        self._stays = folder is not None
        if folder is not None:
            self.path = folder / f"{self._of[:32]}.jsonl"
        else:
            assert evaluation is not None
            self.path = evaluation.with_name(f".{evaluation.name}.answers.jsonl")
        self._known: dict[tuple[str, str], dict[int, str]] = {}
        lines: list[Any] = []
        with suppress(MissingFileError, InputError):  # its last line may be half written
            lines.extend(line for _, line in read_json_lines(self.path))
        if lines[:1] == [{"of": self._of}]:
            for line in lines[1:]:
                if not _is_kept(line):
                    break
                place = self._known.setdefault((line["prompts"], line["attack"]), {})
                place[line["number"]] = line["answer"]
        self._file: TextIO | None = None

    @property
    def count(self) -> int:
        """Answers that were there."""
        return sum(map(len, self._known.values()))

    def of(self, prompts: str, attack: Attack | None) -> Mapping[int, str]:
        """Answers by the number of their prompt in the set; those of `add` among them."""
        return self._known.get((prompts, attack.name if attack else ""), {})

    def add(self, prompts: str, attack: Attack | None, answers: Mapping[int, str]) -> None:
        """Keep answers, at once; the file begins with the first of them."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
            self._write({"of": self._of})
            for place, known in self._known.items():
                self._write(*self._lines(*place, known))
        name = attack.name if attack else ""
        self._write(*self._lines(prompts, name, answers))
        self._known.setdefault((prompts, name), {}).update(answers)

    def done(self) -> None:
        """All are made."""
        if self._file is not None:
            self._file.close()
        if not self._stays:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _lines(prompts: str, attack: str, answers: Mapping[int, str]) -> list[dict[str, Any]]:
        return [
            {"prompts": prompts, "attack": attack, "number": number, "answer": answer}
            for number, answer in answers.items()
        ]

    def _write(self, *lines: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(line) + "\n" for line in lines)
        self._file.flush()


def _is_kept(line: Any) -> bool:
    """Whether a line of the file is an answer, as it is written here."""
    if not isinstance(line, dict) or {*line} != _KEYS:
        return False
    texts = (line["prompts"], line["attack"], line["answer"])
    return all(isinstance(text, str) for text in texts) and type(line["number"]) is int

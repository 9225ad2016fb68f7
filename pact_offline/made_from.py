"""What a result was made from: by this, results that do not belong together are told apart."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pact_offline.models.locate import is_same_model
from pact_offline.rows.row import Row


def rows_sha256(rows: Sequence[Row]) -> str:
    """SHA-256 over what the rows say, in order, wherever they were read from; 64 hex digits."""
    return _sha256(
        [[row.prompt, row.response, *([row.tools] if row.tools else [])] for row in rows]
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class MadeFrom:
    """All that decides the values of a result.

    Attributes:
        models: identity (`ModelFiles.identity`) by role.
        rows: SHA-256 over the rows of each file or prompt set, by its name.
        tokenizer: fingerprint of the vocabulary.
        template: SHA-256 over the chat template.
        adapter: SHA-256 over the files of the adapter or fine-tuned model; None: there is none.
        safety_tokens: SHA-256 over ids and weights; None: there are none.
        code: what fixes each judge and rate, by name.
        settings: those that decide values; no batch sizes.
    """

    models: dict[str, dict[str, str]]
    rows: dict[str, str]
    tokenizer: str
    template: str
    adapter: str | None = None
    safety_tokens: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def difference(self, other: MadeFrom) -> str | None:
        """The first thing that `other` was made from otherwise: what, expected and found.

        What only one of the two was made from (a set of prompts, a guard) is no difference, and
        the adapter is what a run and its reference differ in.
        """
        found, models = other._parts(), {f"{role} model" for role in self.models}
        for part, expected in self._parts().items():
            same = is_same_model if part in models else operator.eq
            if part in found and not same(found[part], expected):
                return f"{part}: expected {_shown(expected)}, found {_shown(found[part])}"
        return None

    def _parts(self) -> dict[str, Any]:
        parts = {
            **{f"{role} model": identity for role, identity in self.models.items()},
            "tokenizer": self.tokenizer,
            "chat template": self.template,
            **{f"{name} prompts": rows for name, rows in self.rows.items()},
            "safety tokens": self.safety_tokens,
            **{f"judge of {name}": code for name, code in self.code.items()},
            **self.settings,
        }
        return {part: value for part, value in parts.items() if value is not None}


def _shown(value: Any) -> str:
    """A value in few words: of checksums the first digits."""
    if isinstance(value, dict):
        if "commit" in value:
            return f"{value['hub']} at commit {value['commit']:.12}"
        return f"weights {_sha256(value):.12}"
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value:.12}"
    return json.dumps(value)

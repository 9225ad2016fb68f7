"""Safety tokens: the ids whose confidence is held, and how much each counts."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import InputError, TargetsMismatchError
from pact_offline.files import is_text, read_json, write_json
from pact_offline.made_from import MadeFrom
from pact_offline.rows.tokenizer import tokenizer_fingerprint
from pact_offline.settings.stages import CHAT_ALIKE
from pact_offline.texts import visible

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SafetyToken:
    """One id of the set.

    Attributes:
        id: token id.
        text: the token, decoded.
        direction: v, the entry of the unit direction; negative entries weigh 0.
        aligned: mean probability under the aligned model; None in a hand-made set.
        base: mean probability under the base model; None in a hand-made set.
    """

    id: int
    text: str
    direction: float
    aligned: float | None = None
    base: float | None = None

    @property
    def weight(self) -> float:
        """w = max(v, 0)."""
        return max(self.direction, 0.0)


@dataclass(frozen=True)
class SafetyTokens:
    """The safety ids in ascending order, with weights.

    Attributes:
        tokens: one entry an id.
        tokenizer: fingerprint of the vocabulary the ids belong to.
        settings: how they were found.
        provenance: models, versions and time; does not determine values.
        made_from: what they were found from; None for a hand-made list, or in an older file.
    """

    tokens: tuple[SafetyToken, ...]
    tokenizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    made_from: MadeFrom | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def weights(self) -> np.ndarray:
        """float32 [ids], at least 0."""
        return np.array([token.weight for token in self.tokens], dtype=np.float32)

    @property
    def digest(self) -> str:
        """SHA-256 over the ids (little-endian int64), then the weights (float32); 64 hex digits."""
        ids, weights = np.array(self.ids, dtype="<i8"), self.weights.astype("<f4")
        return hashlib.sha256(ids.tobytes() + weights.tobytes()).hexdigest()

    def check_template(self, template: str, kwargs: dict[str, Any], source: str | Path) -> None:
        """Refuse a set that was found with another chat template, or other variables of it.

        Args:
            template: SHA-256 over the chat template.
            kwargs: its variables.
            source: the file, for the message.
        """
        if self.made_from is None:  # made by hand
            return
        theirs = self.made_from.settings.get("chat_template_kwargs", {})
        if self.made_from.template != template or theirs != kwargs:
            raise TargetsMismatchError(
                f"{source}: expected safety tokens found with the chat template sha256 "
                f"{template:.12} and variables {kwargs}, found those of "
                f"{self.made_from.template:.12} and {theirs}; {CHAT_ALIKE}"
            )

    def table(self) -> str:
        """The tokens for a person, the heaviest first; spaces are shown as a dot."""
        lines = [f"{'token':16} {'id':>7} {'weight':>8} {'aligned':>9} {'base':>9}"]
        for token in sorted(self.tokens, key=lambda token: -token.direction):
            means = ("-" if m is None else f"{m:.5f}" for m in (token.aligned, token.base))
            columns = " ".join(f"{mean:>9}" for mean in means)
            lines.append(f"{visible(token.text):16} {token.id:7} {token.weight:8.4f} {columns}")
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `safety_tokens.json`."""
        tokens = [{**asdict(token), "weight": token.weight} for token in self.tokens]
        write_json(
            path,
            {
                "format_version": FORMAT_VERSION,
                "tokenizer": self.tokenizer,
                "settings": self.settings,
                "provenance": self.provenance,
                "made_from": self.made_from and asdict(self.made_from),
                "tokens": tokens,
            },
        )

    @classmethod
    def load(cls, path: str | Path, tokenizer: Any | None = None) -> SafetyTokens:
        """Read `safety_tokens.json`; with a tokenizer, refuse a set made for another.

        Raises:
            InputError: not such a file.
            TargetsMismatchError: made for another vocabulary.
        """
        path = Path(path)
        value = read_json(path)
        try:
            if value["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path}: format_version: expected {FORMAT_VERSION}, "
                    f"found {value['format_version']!r}"
                )
            tokens = tuple(
                SafetyToken(
                    int(token["id"]),
                    str(token["text"]),
                    float(token["direction"]),
                    *(None if m is None else float(m) for m in (token["aligned"], token["base"])),
                )
                for token in value["tokens"]
            )
            made_from = value.get("made_from")
            result = cls(
                tokens,
                value["tokenizer"],
                dict(value["settings"]),
                dict(value["provenance"]),
                MadeFrom(**made_from) if made_from else None,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: expected safety tokens, found a bad entry: {error}"
            ) from None
        if not tokens or result.ids != sorted(set(result.ids)) or result.ids[0] < 0:
            raise InputError(f"{path}: tokens: expected ascending, distinct ids, found otherwise")
        for token in tokens:
            text = token.text.replace("\0", "")  # a byte of 0 is a token of many vocabularies
            if token.id >= 2**31 or not math.isfinite(token.direction) or not is_text(text):
                raise InputError(
                    f"{path}: tokens: expected ids, text and finite weights, found {token!r:.80}"
                )
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != result.tokenizer:
            raise TargetsMismatchError(
                f"{path}: expected safety tokens of the tokenizer {tokenizer.name_or_path}, found "
                "those of another vocabulary; run `pact-offline tokens` for this model"
            )
        return result

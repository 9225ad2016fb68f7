"""What tokenizing a row file gave last time, so that a known dataset costs no tokenizer.

Kept for the user, by the bytes of the row file and of the model's tokenizer files. A store still
decides what is known: keys that it does not hold are worth nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pact_offline.errors import InputError, PactError
from pact_offline.files import remembered_checksum, sha256_file, user_cache, write_json
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import installed

_KEPT_FILES = 256


@dataclass(frozen=True)
class Recalled:
    """A tokenized row file.

    Attributes:
        tokenizer: fingerprint of the vocabulary.
        header_ids: assistant header of the response-only contexts.
        examples: both context keys of each row, in order, as in a `Binding`.
    """

    tokenizer: str
    header_ids: tuple[int, ...]
    examples: tuple[str, ...]


def _place(model: ModelFiles, source: str | Path, max_tokens: int) -> Path | None:
    """The file that would remember; None for rows that are not in a file that can be read."""
    try:
        rows = sha256_file(Path(source))
    except (OSError, InputError):
        return None
    parts = [
        "pact-offline rows 1",
        *(f"{name} {installed(name)}" for name in ("transformers", "tokenizers", "jinja2")),
        str(max_tokens),
        rows,
    ]
    for file in sorted(model.path.iterdir()):
        if file.is_file() and file.suffix != ".safetensors":
            parts.append(f"{file.name} {remembered_checksum(file)}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return user_cache() / "rows" / f"{digest}.json"


def recall(model: ModelFiles, source: str | Path, max_tokens: int) -> Recalled | None:
    """What is remembered of a row file under a model's tokenizer, if anything."""
    place = _place(model, source, max_tokens)
    if place is None:
        return None
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
        return Recalled(
            str(value["tokenizer"]), tuple(value["header_ids"]), tuple(value["examples"])
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def remember(model: ModelFiles, source: str | Path, max_tokens: int, found: Recalled) -> None:
    """Keep it for next time; where that is impossible, nothing is lost but time."""
    place = _place(model, source, max_tokens)
    if place is None:
        return
    with contextlib.suppress(OSError, PactError):
        write_json(place, asdict(found))
        files = sorted(place.parent.glob("*.json"), key=lambda file: -file.stat().st_mtime)
        for file in files[_KEPT_FILES:]:
            file.unlink(missing_ok=True)

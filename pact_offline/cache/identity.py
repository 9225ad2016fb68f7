"""What a store's values depend on."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from pact_offline.cache.encoding import StoredDtype
from pact_offline.cache.format import IDENTITY_FILE, is_store
from pact_offline.cache.storage import Storage, join, open_storage
from pact_offline.errors import StoreError
from pact_offline.files import parse_json

FORMAT_VERSION = 3
_MAX_BYTES = 16 << 20


def compute_name(dtype: str, load_in: str | None) -> str:
    """How values were computed, as a store's identity has it: bfloat16, or bfloat16 of 4bit."""
    return dtype if load_in is None else f"{dtype} of {load_in}"


def compute_parts(name: str) -> tuple[str, str | None]:
    """`compute_name` taken apart."""
    dtype, _, load_in = name.partition(" of ")
    return dtype, load_in or None


@dataclass(frozen=True)
class Identity:
    """All that determines the values in a store.

    Attributes:
        reference: hub id and commit, or file name to SHA-256 of config and weights.
        safety_ids: token ids of the columns, ascending.
        header_ids: assistant header of the response-only contexts.
        engine: name and version of what computed the values.
        compute_dtype: dtype of the forward pass, and bits of the weights where they are few, as
            `compute_name` has it.
        stored_dtype: encoding of the stored values.
        format_version: of the store.
    """

    reference: dict[str, str]
    safety_ids: tuple[int, ...]
    header_ids: tuple[int, ...]
    engine: str
    compute_dtype: str
    stored_dtype: StoredDtype
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 over the fields as JSON with sorted keys and no spaces, 64 hex digits."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**value, "safety_ids": [*self.safety_ids], "header_ids": [*self.header_ids]}

    @classmethod
    def from_dict(cls, value: Any, source: str) -> Identity:
        """Check and read the fields; `StoreError` names `source` and the key."""
        kinds = {
            "reference": dict,
            "safety_ids": list,
            "header_ids": list,
            "engine": str,
            "compute_dtype": str,
            "stored_dtype": str,
            "format_version": int,
        }
        if not isinstance(value, dict) or set(value) != set(kinds):
            raise StoreError(f"{source}: expected the keys {', '.join(kinds)}, found otherwise")
        for key, kind in kinds.items():
            if not isinstance(value[key], kind):
                raise StoreError(
                    f"{source}: {key}: expected {kind.__name__}, found {value[key]!r:.40}"
                )
        if value["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{source}: format_version: expected {FORMAT_VERSION}, "
                f"found {value['format_version']!r:.40}, of another pact-offline; run "
                "`pact-offline score` again"
            )
        if value["stored_dtype"] not in get_args(StoredDtype):
            raise StoreError(
                f"{source}: stored_dtype: expected one of {', '.join(get_args(StoredDtype))}, "
                f"found {value['stored_dtype']!r:.40}"
            )
        if not all(isinstance(text, str) for pair in value["reference"].items() for text in pair):
            raise StoreError(f"{source}: reference: expected names and checksums, found otherwise")
        for key in ("safety_ids", "header_ids"):
            if not all(isinstance(item, int) and 0 <= item < 2**31 for item in value[key]):
                raise StoreError(f"{source}: {key}: expected token ids, found otherwise")
        return cls(
            **{
                **value,
                "safety_ids": tuple(value["safety_ids"]),
                "header_ids": tuple(value["header_ids"]),
            }
        )

    def to_bytes(self) -> bytes:
        """`identity.json`."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()


def read_identity(storage: Storage) -> Identity:
    """Read a store's `identity.json`.

    Raises:
        StoreError: there is none, or not one byte for byte as this format writes it.
    """
    place = f"{storage.url}/{IDENTITY_FILE}"
    if not storage.has(IDENTITY_FILE):
        raise StoreError(f"{storage.url}: expected a store with {IDENTITY_FILE}, found none")
    data = storage.read(IDENTITY_FILE, _MAX_BYTES)
    identity = Identity.from_dict(parse_json(data, place, StoreError), place)
    if identity.to_bytes() != data:
        raise StoreError(f"{place}: expected the bytes that were written, found others")
    return identity


def store_path(cache: str | Path, model_name: str, identity: Identity) -> str:
    """CACHE/<name>-<12 hex>: the name is for people, the digits decide.

    A store that is there already under these digits is taken, whatever its name.
    """
    suffix = f"-{identity.digest[:12]}"
    for entry in open_storage(cache).names():
        place = join(cache, entry)
        if entry.endswith(suffix) and is_store(open_storage(place)):
            return place
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip(".-") or "model"
    return join(cache, f"{name[:48]}{suffix}")

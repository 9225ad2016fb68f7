"""The facts of the format: file names, columns, keys and ids. Each is written down here alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pact_offline.arrow import array_of, numbers
from pact_offline.cache.encoding import StoredDtype, step_records
from pact_offline.cache.storage import Storage
from pact_offline.errors import DamagedError, StoreError
from pact_offline.rows.contexts import CONTEXT_KINDS, KEY_BYTES

IDENTITY_FILE = "identity.json"
SHARDS = "shards"
BINDINGS = "bindings"
SIDECAR = "shard.json"
CONTEXTS = "contexts.arrow"
_KEY_DIGITS = 2 * KEY_BYTES
_ID = re.compile(r"[0-9a-f]{32}")

# Fixed widths only: no declared length can ask for more memory than the file has bytes.
SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("kind", pa.int8()), ("steps", pa.int32())])


def is_shard_id(value: Any) -> TypeGuard[str]:
    """Whether it is 32 hex digits, as every shard's id is."""
    return isinstance(value, str) and bool(_ID.fullmatch(value))


def check_shard_id(value: Any, source: str) -> str:
    """Refuse anything that is not a shard's id, so that no name becomes a path."""
    if not is_shard_id(value):
        raise DamagedError(f"{source}: expected a shard id of 32 hex digits, found {value!r:.60}")
    return value


def shard_id_of(sidecar: bytes) -> str:
    """The id of a shard with this sidecar: the first 16 bytes of its SHA-256, in hex."""
    return hashlib.sha256(sidecar).hexdigest()[:32]


def shard_folder(shard_id: str) -> str:
    """Where a shard lies in its store."""
    return f"{SHARDS}/{shard_id}"


def is_committed(storage: Storage, shard_id: str) -> bool:
    """Whether a shard exists: its sidecar, which is written last and removed first, is there."""
    try:
        return storage.has(f"{shard_folder(shard_id)}/{SIDECAR}")
    except DamagedError:  # a link, which whoever reads the shard refuses
        return True


def shard_ids(storage: Storage) -> list[str]:
    """Ids of the committed shards, sorted."""
    names = filter(is_shard_id, storage.names(SHARDS))
    return [name for name in names if is_committed(storage, name)]


def strays(storage: Storage) -> list[str]:
    """A line for each entry among a store's shards that is none, but for hidden ones."""
    names = [name for name in storage.names(SHARDS) if not name.startswith(".")]
    return [
        f"{storage.url}/{SHARDS}/{name}: expected a shard, named by 32 hex digits; left alone"
        for name in names
        if not is_shard_id(name)
    ]


def is_store(storage: Storage) -> bool:
    """Whether a store lies here, whole or not."""
    try:
        return storage.has(IDENTITY_FILE) or any(map(is_shard_id, storage.names(SHARDS)))
    except StoreError:  # whoever opens it says what is wrong
        return True


def array_files(stored_dtype: StoredDtype) -> dict[str, tuple[str, str]]:
    """Each array's files: its Zarr metadata and its one chunk."""
    return {
        name: (f"{name}.zarr/zarr.json", f"{name}.zarr/c/0{'/0' * len(record.shape)}")
        for name, record in step_records(stored_dtype, 1).items()
    }


def data_files(stored_dtype: StoredDtype) -> tuple[str, ...]:
    """Every file of a shard but the sidecar."""
    files = array_files(stored_dtype).values()
    return (CONTEXTS, *(name for pair in files for name in pair))


@dataclass(frozen=True)
class Sidecar:
    """`shard.json`.

    Attributes:
        identity: digest of the store's identity.
        contexts, steps: rows of the Arrow table and of the arrays.
        files: relative path to SHA-256, every file but the sidecar.
        provenance: what is recorded but determines no value.
    """

    identity: str
    contexts: int
    steps: int
    files: dict[str, str]
    provenance: dict[str, Any]


def find_keys(wanted: pa.Array, keys: pa.Array) -> np.ndarray:
    """Where each wanted key stands first among `keys`, int64; -1 where it does not."""
    found = pc.index_in(wanted, value_set=keys)
    places = numbers(found).astype(np.int64)
    if found.null_count:
        bits = np.unpackbits(np.frombuffer(found.buffers()[0], np.uint8), bitorder="little")
        places[bits[found.offset : found.offset + len(found)] == 0] = -1
    return places


def contexts_table(keys: Sequence[str], kinds: Sequence[str], steps: np.ndarray) -> pa.Table:
    """The table of a shard's contexts."""
    codes = np.array([CONTEXT_KINDS.index(kind) for kind in kinds], dtype=np.int8)  # type: ignore[arg-type]
    columns = [pack_keys(keys), array_of(codes), array_of(steps.astype(np.int32))]
    return pa.table(columns, schema=SCHEMA)


def context_columns(table: pa.Table) -> tuple[pa.FixedSizeBinaryArray, np.ndarray]:
    """Keys and steps, int64, of a shard's contexts; `ValueError` where a kind or step is none."""
    keys, kinds, steps = (table[name].combine_chunks() for name in SCHEMA.names)
    if not np.isin(numbers(kinds), range(len(CONTEXT_KINDS))).all() or (numbers(steps) < 1).any():
        raise ValueError("expected kinds and steps of contexts")
    return keys, numbers(steps).astype(np.int64)


def pack_keys(hex_keys: Sequence[str]) -> pa.FixedSizeBinaryArray:
    """Context keys as fixed-size binary; `ValueError` where one is not 32 hex digits."""
    data = bytes.fromhex("".join(hex_keys))
    if len(data) != KEY_BYTES * len(hex_keys):
        raise ValueError(f"expected keys of {_KEY_DIGITS} hex digits")
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(hex_keys), [None, pa.py_buffer(data)]
    )


def join_keys(parts: Sequence[pa.Array]) -> pa.FixedSizeBinaryArray:
    """Keys of many shards, one after the other."""
    return pa.concat_arrays([pack_keys([]), *parts])

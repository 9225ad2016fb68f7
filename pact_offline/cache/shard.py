"""One shard: an immutable directory that appears by one rename.

<shard id>/shard.json                 the sidecar: counts, provenance, SHA-256 of every file
<shard id>/contexts.arrow             key, kind, first_step, steps; one row a context
<shard id>/log_confidence.zarr/...    Zarr v3 array [steps, safety ids]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from pact_offline.conversations import CONTEXT_KINDS
from pact_offline.errors import StoreError
from pact_offline.files import sha256_file

SIDECAR = "shard.json"
CONTEXTS = "contexts.arrow"
ARRAY = "log_confidence.zarr"
CHUNK_STEPS = 4096
_ID = re.compile(r"[0-9a-f]{32}")
_MAX_SIDECAR = 1 << 20

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("kind", pa.string()),
        ("first_step", pa.int64()),
        ("steps", pa.int32()),
    ]
)


def check_shard_id(value: Any, source: str) -> str:
    """Refuse anything that is not 32 hex digits, so that no name becomes a path."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise StoreError(f"{source}: expected a shard id of 32 hex digits, found {value!r:.60}")
    return value


@dataclass(frozen=True)
class Sidecar:
    """`shard.json`.

    Attributes:
        identity: digest of the store's identity.
        contexts, steps: rows of the Arrow table and of the array.
        files: relative path to SHA-256, every file but the sidecar.
        provenance: what is recorded but determines no value.
    """

    identity: str
    contexts: int
    steps: int
    files: dict[str, str]
    provenance: dict[str, Any]


def read_sidecar(shard: Path) -> Sidecar:
    """Read and check a shard's sidecar; `StoreError` where there is none or it is damaged."""
    path = shard / SIDECAR
    try:
        if path.stat().st_size > _MAX_SIDECAR:
            raise StoreError(f"{path}: expected at most {_MAX_SIDECAR} bytes, found more")
        value = json.loads(path.read_bytes())
        sidecar = Sidecar(**value)
        right = (
            isinstance(sidecar.files, dict)
            and isinstance(sidecar.contexts, int)
            and isinstance(sidecar.steps, int)
            and all(_is_inside(name) for name in sidecar.files)
        )
    except StoreError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: expected a shard's sidecar, found: {error}") from None
    if not right:
        raise StoreError(f"{path}: expected counts and files of a shard, found otherwise")
    return sidecar


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and ".." not in parts and "\\" not in name


def write_shard(
    folder: Path,
    keys: Sequence[str],
    kinds: Sequence[str],
    values: Sequence[np.ndarray],
    *,
    identity: str,
    stored_dtype: str,
    provenance: dict[str, Any],
) -> None:
    """Write a shard's files and, last, its sidecar into an empty folder.

    Args:
        folder: made here.
        keys, kinds, values: one entry a context; values are [steps, safety ids].
        identity: digest of the store's identity.
        stored_dtype: dtype on disk.
        provenance: recorded in the sidecar.
    """
    folder.mkdir(parents=True)
    steps = [len(item) for item in values]
    rows = np.concatenate(values).astype(stored_dtype)
    array = zarr.create_array(
        folder / ARRAY,
        shape=rows.shape,
        dtype=rows.dtype,
        chunks=(min(CHUNK_STEPS, len(rows)), rows.shape[1]),
        compressors=zarr.codecs.BloscCodec(
            cname="zstd", clevel=5, shuffle="bitshuffle", typesize=rows.dtype.itemsize
        ),
        fill_value=0,
    )
    array[:] = rows
    firsts = np.cumsum([0, *steps[:-1]], dtype=np.int64)
    table = pa.table(
        [[bytes.fromhex(key) for key in keys], list(kinds), firsts, np.array(steps, np.int32)],
        schema=SCHEMA,
    )
    with pa.OSFile(str(folder / CONTEXTS), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table)
    files = {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    sidecar = Sidecar(identity, len(keys), len(rows), files, provenance)
    (folder / SIDECAR).write_text(json.dumps(asdict(sidecar), indent=1) + "\n", encoding="utf-8")


def verify_shard(shard: Path, sidecar: Sidecar) -> None:
    """Check the bytes of every file, and that there is no file more.

    Raises:
        StoreError: names the file.
    """
    found = set()
    for path in sorted(shard.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path}: expected a plain file, found a symbolic link")
        if path.is_file():
            found.add(path.relative_to(shard).as_posix())
    found.discard(SIDECAR)
    if found != set(sidecar.files):
        odd = sorted(found ^ set(sidecar.files))[0]
        raise StoreError(f"{shard}: expected the files its sidecar lists, found {odd!r} otherwise")
    for name in sidecar.files:
        _verify_file(shard, name, sidecar)


def _verify_file(shard: Path, name: str, sidecar: Sidecar) -> None:
    expected = str(sidecar.files.get(name))
    try:
        actual = sha256_file(shard / name)
    except OSError as error:
        raise StoreError(f"{shard / name}: cannot be read: {error.strerror}") from None
    if actual != expected:
        raise StoreError(
            f"{shard / name}: expected the bytes that were written "
            f"(sha256 {expected:.12}…), found others (sha256 {actual:.12}…)"
        )


def read_contexts(shard: Path, sidecar: Sidecar) -> pa.Table:
    """The Arrow table of a shard: key, kind, first_step, steps.

    Raises:
        StoreError: its bytes are not those that were written, or its rows lie outside the array.
    """
    path = shard / CONTEXTS
    _verify_file(shard, CONTEXTS, sidecar)
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: expected an Arrow table, found: {error}") from None
    if table.schema != SCHEMA or len(table) != sidecar.contexts:
        raise StoreError(f"{path}: expected {sidecar.contexts} contexts, found otherwise")
    first, steps = table["first_step"].to_numpy(), table["steps"].to_numpy()
    kinds = set(table["kind"].unique().to_pylist())
    inside = (first >= 0) & (steps > 0) & (first + steps <= sidecar.steps)
    if not inside.all() or not kinds <= set(CONTEXT_KINDS):
        raise StoreError(f"{path}: expected contexts within {sidecar.steps} steps, found otherwise")
    return table


def read_array(shard: Path, sidecar: Sidecar, ids: int, dtype: str) -> np.ndarray:
    """The shard's log-confidences, [steps, ids] in `dtype`.

    Raises:
        StoreError: another shape or dtype than the identity and sidecar say.
    """
    path = shard / ARRAY
    try:
        array = zarr.open_array(path, mode="r", zarr_format=3)
        if array.shape != (sidecar.steps, ids) or array.dtype != np.dtype(dtype):
            raise StoreError(
                f"{path}: expected {dtype} [{sidecar.steps}, {ids}], "
                f"found {array.dtype} {list(array.shape)}"
            )
        return np.asarray(array[:])
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{path}: expected a Zarr array, found: {error}") from None

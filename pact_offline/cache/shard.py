"""One shard: an immutable folder of a store, committed whole.

shards/<shard id>/shard.json             the sidecar: counts, provenance, SHA-256 of every file
shards/<shard id>/contexts.arrow         key, kind, steps; one row a context, in the arrays' order
shards/<shard id>/log_confidence.zarr/   Zarr v3 array [steps, safety ids], one plain chunk
shards/<shard id>/bounds.zarr/           Zarr v3 array [steps, 2]; beside eight-bit codes only
shards/<shard id>/label.zarr/            Zarr v3 array [steps]: of the response's own tokens

A shard's id is the start of its sidecar's SHA-256, so whoever knows the id can check every byte.
The files' names are fixed; none is read from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pact_offline.cache.encoding import encode, encode_labels, step_records
from pact_offline.cache.format import (
    CONTEXTS,
    SCHEMA,
    SIDECAR,
    Sidecar,
    array_files,
    context_columns,
    contexts_table,
    data_files,
    is_committed,
    shard_folder,
    shard_id_of,
)
from pact_offline.cache.identity import Identity
from pact_offline.cache.plain_arrow import read_table, to_bytes
from pact_offline.cache.storage import Storage
from pact_offline.errors import DamagedError, InputError, StoreError
from pact_offline.files import parse_json, sha256_file

_MAX_SIDECAR = 1 << 20
_MENDED_BY = (
    "`pact-offline cache verify STORE --repair` drops the shard, and `pact-offline score` "
    "fills the gap"
)


_ROW_BYTES = 64


class Contexts(NamedTuple):
    """A shard's contexts: keys, fixed-size binary [contexts]; steps of each, int64 [contexts]."""

    keys: pa.FixedSizeBinaryArray
    steps: np.ndarray


def shard_files(
    keys: Sequence[str],
    kinds: Sequence[str],
    values: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    *,
    identity: Identity,
    provenance: dict[str, Any],
) -> tuple[str, dict[str, bytes]]:
    """A shard's files, made in memory so that what lies on a disk can be held against them.

    Args:
        keys, kinds, values, labels: one entry a context; values are [steps, safety ids], labels
            [steps].
        identity: of the store.
        provenance: recorded in the sidecar.

    Returns:
        the shard's id, and relative path to bytes of every file.
    """
    import zarr  # slow to import, and not needed to know what a store holds

    steps = np.array([len(item) for item in values])
    files = {CONTEXTS: to_bytes(contexts_table(keys, kinds, steps))}
    arrays = encode(np.concatenate(values), identity.stored_dtype)
    arrays["label"] = encode_labels(np.concatenate(labels), identity.stored_dtype)
    for name, (metadata, chunk) in array_files(identity.stored_dtype).items():
        rows = arrays[name]
        made: dict[str, Any] = {}
        zarr.create_array(
            made,
            shape=rows.shape,
            dtype=rows.dtype,
            chunks=rows.shape,
            compressors=None,
            filters=None,
            fill_value=0,
        )
        files |= {metadata: made["zarr.json"].to_bytes(), chunk: rows.tobytes()}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    sidecar = Sidecar(identity.digest, len(keys), int(steps.sum()), sums, provenance)
    files[SIDECAR] = (json.dumps(asdict(sidecar), indent=1) + "\n").encode()
    return shard_id_of(files[SIDECAR]), files


class Shard:
    """A committed shard, read-only."""

    def __init__(self, storage: Storage, shard_id: str, identity: Identity) -> None:
        """Read the sidecar.

        Raises:
            DamagedError: there is none, it is damaged, or it is of another store.
        """
        self._storage, self._identity = storage, identity
        self.id, self._folder = shard_id, shard_folder(shard_id)
        self.place = f"{storage.url}/{self._folder}"
        data = storage.read(f"{self._folder}/{SIDECAR}", _MAX_SIDECAR)
        if shard_id_of(data) != shard_id:
            raise DamagedError(
                f"{self.place}/{SIDECAR}: expected the bytes that were written, found others; "
                f"{_MENDED_BY}"
            )
        self.sidecar = _parse_sidecar(data, f"{self.place}/{SIDECAR}")
        if self.sidecar.identity != identity.digest:
            raise DamagedError(
                f"{self.place}: expected a shard of this store, found one of another"
            )
        if set(self.sidecar.files) != set(data_files(identity.stored_dtype)):
            raise DamagedError(
                f"{self.place}/{SIDECAR}: files: expected "
                f"{', '.join(data_files(identity.stored_dtype))}, found others"
            )

    def contexts(self) -> Contexts:
        """The keys and steps of its contexts, after their bytes have been checked.

        Raises:
            DamagedError: other bytes than were written, or rows that do not fit the arrays.
        """
        sidecar, path = self.sidecar, self._verified(CONTEXTS)
        place = f"{self.place}/{CONTEXTS}"
        if path.stat().st_size > _ROW_BYTES * (sidecar.contexts + 1024):
            raise DamagedError(
                f"{place}: expected {sidecar.contexts} contexts, found a larger file"
            )
        table = read_table(path, SCHEMA, place)
        if len(table) != sidecar.contexts:
            raise DamagedError(f"{place}: expected {sidecar.contexts} contexts, found {len(table)}")
        try:
            keys, steps = context_columns(table)
        except ValueError as error:
            raise DamagedError(f"{place}: {error}, found others") from None
        if steps.sum() != sidecar.steps:
            raise DamagedError(f"{place}: expected {sidecar.steps} steps, found {steps.sum()}")
        return Contexts(keys, steps)

    def arrays(self) -> dict[str, Path]:
        """The chunk file of each array, after its bytes and metadata have been checked.

        Raises:
            DamagedError: other bytes than were written, or an array of another shape or form.
        """
        steps, ids = self.sidecar.steps, len(self._identity.safety_ids)
        chunks = {}
        files = array_files(self._identity.stored_dtype)
        for name, record in step_records(self._identity.stored_dtype, ids).items():
            metadata, chunk = files[name]
            shape = (steps, *record.shape)
            folder = self._verified(metadata).parent
            _check_array(folder, shape, record.base, f"{self.place}/{name}.zarr")
            path = self._verified(chunk)
            if path.stat().st_size != steps * record.itemsize:
                raise DamagedError(
                    f"{self.place}/{chunk}: expected {shape} {record.base}, found otherwise"
                )
            chunks[name] = path
        return chunks

    def verify(self) -> dict[str, Path]:
        """Check every byte, and that no file lies there that the sidecar does not list.

        Returns:
            as `arrays`.
        """
        self.contexts()
        chunks = self.arrays()
        expected = {name.split("/")[0] for name in self.sidecar.files} | {SIDECAR}
        if odd := sorted(set(self._storage.names(self._folder)) - expected):
            raise DamagedError(
                f"{self.place}: expected only the files of a shard, found {odd[0]!r}"
            )
        return chunks

    def require_files(self) -> None:
        """Look that every file is there, the chunks as long as they were; read no byte.

        Raises:
            DamagedError: one is not.
        """
        ids, sizes = len(self._identity.safety_ids), {}
        files = array_files(self._identity.stored_dtype)
        for name, record in step_records(self._identity.stored_dtype, ids).items():
            sizes[files[name][1]] = self.sidecar.steps * record.itemsize
        for name in data_files(self._identity.stored_dtype):
            place = f"{self._folder}/{name}"
            if not self._storage.has(place):
                raise DamagedError(
                    f"{self.place}/{name}: expected a file, found none; {_MENDED_BY}"
                )
            if name in sizes and (found := self._storage.size(place)) != sizes[name]:
                raise DamagedError(
                    f"{self.place}/{name}: expected {sizes[name]} bytes, found {found}; "
                    f"{_MENDED_BY}"
                )

    def _verified(self, name: str) -> Path:
        path = self._storage.local(self._folder, (name,)) / name
        expected = self.sidecar.files[name]
        try:
            actual = sha256_file(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedError(f"{self.place}/{name}: expected a file, found none") from None
        except InputError as error:
            raise DamagedError(str(error)) from None
        except OSError as error:
            raise StoreError(f"{self.place}/{name}: cannot be read: {error.strerror}") from None
        if actual != expected:
            self._storage.release(self._folder)  # what is copied again may be right
            raise DamagedError(
                f"{self.place}/{name}: expected the bytes that were written (sha256 "
                f"{expected:.12}…), found others ({actual:.12}…); {_MENDED_BY}"
            )
        return path


@contextmanager
def unless_removed(storage: Storage, shard_id: str) -> Iterator[None]:
    """Pass over damage of a shard that another process has removed meanwhile."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        if is_committed(storage, shard_id):
            raise


def _parse_sidecar(data: bytes, source: str) -> Sidecar:
    value = parse_json(data, source, DamagedError)
    try:
        sidecar = Sidecar(**value)
    except TypeError as error:
        raise DamagedError(f"{source}: expected a shard's sidecar, found: {error}") from None
    counts = (sidecar.contexts, sidecar.steps)
    right = (
        isinstance(sidecar.files, dict)
        and all(isinstance(text, str) for item in sidecar.files.items() for text in item)
        and all(isinstance(count, int) and count > 0 for count in counts)
        and isinstance(sidecar.provenance, dict)
    )
    if not right:
        raise DamagedError(f"{source}: expected counts and files of a shard, found otherwise")
    return sidecar


def _check_array(folder: Path, shape: tuple[int, ...], dtype: np.dtype, place: str) -> None:
    import zarr

    try:
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]
    except OSError as error:
        raise StoreError(f"{place}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zarr raises many kinds on metadata that is none
        raise DamagedError(f"{place}: expected a Zarr array, found: {error}") from None
    found = (array.shape, array.dtype, array.chunks, codecs)
    if found != (shape, dtype, shape, ["bytes"]):
        raise DamagedError(
            f"{place}: expected {dtype} {list(shape)} in one plain chunk, found {array.dtype} "
            f"{list(array.shape)} in chunks of {list(array.chunks)} by {', '.join(codecs)}"
        )

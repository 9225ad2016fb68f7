"""Reading a store: contexts by position, values by context."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pact_offline.cache.encoding import decode, step_records
from pact_offline.cache.format import find_keys, is_committed, join_keys, pack_keys, shard_ids
from pact_offline.cache.identity import read_identity
from pact_offline.cache.shard import Shard
from pact_offline.cache.storage import open_storage
from pact_offline.errors import DamagedError, StoreError

_OPEN_FILES = 256


class Store:
    """A directory of committed shards of one identity, read-only.

    A context is named by its position: shards in the order of their ids, contexts in theirs. Of a
    context that two shards hold, the first is taken.
    """

    def __init__(
        self,
        place: str | Path,
        shards: Sequence[str] | None = None,
        *,
        leave_out: Callable[[DamagedError], None] | None = None,
    ) -> None:
        """Open a store, or only some of its shards.

        Args:
            place: path or URL.
            shards: ids; all by default.
            leave_out: is told of a shard that lacks a file or holds no table of contexts, and the
                store is opened without it. Without this, such a shard is an error.

        Raises:
            StoreError: not a store, or a shard is damaged.
        """
        self.place = str(place)
        self._storage = open_storage(place)
        self.identity = read_identity(self._storage)
        self.shards: list[Shard] = []
        self._keys = join_keys([])
        self.steps = self._first = self._shard_of = np.zeros(0, dtype=np.int64)
        self._chunks: dict[int, dict[str, Path]] = {}
        self._files: OrderedDict[tuple[int, str], int] = OrderedDict()
        self.add(shard_ids(self._storage) if shards is None else shards, leave_out=leave_out)

    def add(
        self, shards: Sequence[str], *, leave_out: Callable[[DamagedError], None] | None = None
    ) -> None:
        """Open more shards; contexts keep their positions, and those of these follow.

        Args:
            shards: ids of the same store.
            leave_out: as when a store is opened.
        """
        tables = []
        for shard_id in shards:
            try:
                shard = Shard(self._storage, shard_id, self.identity)
                table = shard.contexts()
                if leave_out is not None:
                    shard.require_files()
            except DamagedError as error:
                if leave_out is None:
                    raise
                if is_committed(self._storage, shard_id):  # else it was removed just now
                    leave_out(error)
            else:
                self.shards.append(shard)
                tables.append(table)
        counts = [len(table.steps) for table in tables]
        first = len(self.shards) - len(tables)
        firsts = [np.cumsum(table.steps) - table.steps for table in tables]
        numbers = np.repeat(np.arange(first, len(self.shards)), counts)
        self._keys = join_keys([self._keys, *(table.keys for table in tables)])
        self.steps = np.concatenate([self.steps, *(table.steps for table in tables)])
        self._first = np.concatenate([self._first, *firsts])
        self._shard_of = np.concatenate([self._shard_of, numbers])

    def __len__(self) -> int:
        return len(self.steps)

    def locate(self, keys: Sequence[str]) -> np.ndarray:
        """Positions of contexts, int64 [keys]; -1 where the store does not hold one."""
        return self.find(pack_keys(keys))

    def find(self, keys: pa.FixedSizeBinaryArray) -> np.ndarray:
        """`locate`, of packed keys."""
        return find_keys(keys, self._keys)

    def shards_of(self, positions: np.ndarray) -> list[str]:
        """Ids of the shards that hold some contexts, each once."""
        return [self.shards[number].id for number in np.unique(self._shard_of[positions])]

    def read(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-confidences of some contexts one after the other, float32 [steps, safety ids].

        The bytes of a shard are checked before its first value is used.
        """
        ids = len(self.identity.safety_ids)
        records = step_records(self.identity.stored_dtype, ids)
        del records["label"]
        return decode({name: self._read(name, kind, positions) for name, kind in records.items()})

    def read_labels(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probabilities of the response's own tokens, float32 [steps]; as `read`."""
        record = step_records(self.identity.stored_dtype, 1)["label"]
        return self._read("label", record, positions).astype(np.float32)

    def _read(
        self, name: str, record: np.dtype, positions: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        parts = [self._records(name, record.itemsize, int(place)) for place in positions]
        return np.frombuffer(b"".join(parts), dtype=record)

    def verify(self) -> None:
        """Check every byte of every shard; `StoreError` names the first file that is not whole."""
        for number, shard in enumerate(self.shards):
            self._chunks[number] = shard.verify()

    def _records(self, name: str, width: int, position: int) -> bytes:
        shard, count = int(self._shard_of[position]), int(self.steps[position]) * width
        data = _read_at(self._open(shard, name), count, int(self._first[position]) * width)
        if len(data) != count:
            raise StoreError(f"{self.shards[shard].place}/{name}.zarr: expected more bytes")
        return data

    def _open(self, shard: int, name: str) -> int:
        handle = self._files.get((shard, name))
        if handle is None:
            handle = self._files[shard, name] = self._open_chunk(shard, name)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return handle

    def _open_chunk(self, shard: int, name: str) -> int:
        try:
            path = self._chunks.get(shard, {}).get(name)
            if path is None or not path.exists():  # a copy that went with its process
                self._chunks[shard] = self.shards[shard].arrays()
            return os.open(self._chunks[shard][name], os.O_RDONLY)
        except OSError as error:
            place = f"{self.shards[shard].place}/{name}.zarr"
            raise StoreError(f"{place}: cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # each process opens its own


def _read_at(handle: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # not moved by another process that shares the handle
        return os.pread(handle, count, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)

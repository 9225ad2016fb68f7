"""Reading stores and the bindings to them."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pact_offline.cache.encoding import array_dtypes, decode
from pact_offline.cache.identity import Identity, read_identity
from pact_offline.cache.shard import (
    Shard,
    check_shard_id,
    find_keys,
    join_keys,
    pack_keys,
    shard_ids,
)
from pact_offline.cache.storage import open_storage
from pact_offline.config import read_json
from pact_offline.conversations import (
    CONTEXT_KINDS,
    ContextKind,
    TokenizedExample,
    contexts_of,
)
from pact_offline.errors import MissingTargetError, StoreError, TargetsMismatchError
from pact_offline.files import write_json
from pact_offline.hub import ModelFiles

FORMAT_VERSION = 2
_OPEN_FILES = 256


class Targets(NamedTuple):
    """Reference log-confidences of one example, float32 [steps, safety ids] each."""

    full: np.ndarray
    response_only: np.ndarray


class Store:
    """A directory of committed shards of one identity, read-only.

    A context is named by its position: shards in the order of their ids, contexts in theirs. Of a
    context that two shards hold, the first is taken.
    """

    def __init__(self, place: str | Path, shards: Sequence[str] | None = None) -> None:
        """Open a store, or only some of its shards.

        Raises:
            StoreError: not a store, or a shard is damaged.
        """
        self.place = str(place)
        self._storage = open_storage(place)
        self.identity = read_identity(self._storage)
        ids = shard_ids(self._storage) if shards is None else shards
        self.shards = [Shard(self._storage, shard_id, self.identity) for shard_id in ids]
        tables = [shard.contexts() for shard in self.shards]
        self._keys = join_keys([table.keys for table in tables])
        empty = np.zeros(0, dtype=np.int64)
        self.steps = np.concatenate([empty, *(table.steps for table in tables)])
        firsts = [np.cumsum(table.steps) - table.steps for table in tables]
        self._first = np.concatenate([empty, *firsts])
        counts = [len(table.steps) for table in tables]
        self._shard_of = np.repeat(np.arange(len(counts)), counts)
        self._chunks: dict[int, dict[str, Path]] = {}
        self._files: OrderedDict[tuple[int, str], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.steps)

    def locate(self, keys: Sequence[str]) -> np.ndarray:
        """Positions of contexts, int64 [keys]; -1 where the store does not hold one."""
        return find_keys(pack_keys(keys), self._keys)

    def shards_of(self, positions: np.ndarray) -> list[str]:
        """Ids of the shards that hold some contexts, each once."""
        return [self.shards[number].id for number in np.unique(self._shard_of[positions])]

    def read(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-confidences of some contexts one after the other, float32 [steps, safety ids].

        The bytes of a shard are checked before its first value is used.
        """
        ids, records = len(self.identity.safety_ids), {}
        for name, dtype in array_dtypes(self.identity.stored_dtype).items():
            columns = ids if name == "log_confidence" else 2
            width = columns * dtype.itemsize
            parts = [self._records(name, width, int(position)) for position in positions]
            records[name] = np.frombuffer(b"".join(parts), dtype=dtype).reshape(-1, columns)
        return decode(records)

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
            if shard not in self._chunks:
                self._chunks[shard] = self.shards[shard].arrays()
            handle = os.open(self._chunks[shard][name], os.O_RDONLY)
            self._files[shard, name] = handle
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return handle

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # each process opens its own


@dataclass(frozen=True)
class Binding:
    """`targets.json`: a dataset bound to the shards that hold its targets.

    Attributes:
        store: directory of the store, relative to the file or absolute, or an fsspec URL.
        identity: of the store.
        tokenizer: fingerprint of the vocabulary.
        max_tokens: rows were cut at this many.
        examples: for each row, 64 hex digits: the keys of its full and response-only context.
        shards: ids of the shards that hold them; an id is the start of a sidecar's SHA-256.
        rows: sources and their row counts.
        provenance: recorded, determines no value.
    """

    store: str
    identity: Identity
    tokenizer: str
    max_tokens: int
    examples: tuple[str, ...]
    shards: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    provenance: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write the binding; a local store's path is kept relative to it."""
        store = self.store
        if "://" not in store:
            store = Path(os.path.relpath(Path(store).resolve(), path.parent.resolve())).as_posix()
        write_json(path, {**self.__dict__, "store": store, "identity": self.identity.to_dict()})

    @classmethod
    def load(cls, path: Path) -> Binding:
        """Read and check targets.json; `StoreError` names the key that is wrong."""
        value = read_json(path, StoreError)
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or "format_version" not in value:
            raise StoreError(f"{path}: expected the keys of a targets.json, found otherwise")
        if value["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format_version: expected {FORMAT_VERSION}, "
                f"found {value['format_version']!r:.40}; run `pact-offline score` again"
            )
        if set(value) != names:
            odd = sorted(set(value) ^ names)[0]
            raise StoreError(
                f"{path}: expected the keys of a targets.json, found {odd!r} otherwise"
            )
        kinds = {"store": str, "tokenizer": str, "max_tokens": int, "examples": list}
        for key, kind in {**kinds, "shards": list, "rows": list, "provenance": dict}.items():
            if not isinstance(value[key], kind):
                raise StoreError(
                    f"{path}: {key}: expected {kind.__name__}, found {value[key]!r:.40}"
                )
        for shard in value["shards"]:
            check_shard_id(shard, f"{path}: shards")
        for index, keys in enumerate(value["examples"]):
            if not isinstance(keys, str) or len(keys) != 64:
                raise StoreError(f"{path}: examples[{index}]: expected two context keys")
        value["identity"] = Identity.from_dict(value["identity"], f"{path}: identity")
        for key in ("examples", "shards", "rows"):
            value[key] = tuple(value[key])
        return cls(**value)

    def keys(self) -> list[str]:
        """Every row's two keys, one after the other."""
        return [keys[half : half + 32] for keys in self.examples for half in (0, 32)]


class TargetCache:
    """The targets of one dataset, by example index.

    Opened with `TargetCache.open`. Safe to hand to data-loader workers.
    """

    def __init__(self, path: Path, binding: Binding, store: Store, sha256: str) -> None:
        self.path, self.binding, self._store, self.sha256 = path, binding, store, sha256
        try:
            places = store.locate(binding.keys())
        except ValueError:
            raise StoreError(f"{path}: examples: expected hex digits, found others") from None
        if (places < 0).any():
            missing = int(np.argmax(places < 0))
            raise MissingTargetError(
                f"{path}: examples[{missing // 2}]: expected its {CONTEXT_KINDS[missing % 2]} "
                f"context in {store.place}, found none; run `pact-offline score` to fill the gap"
            )
        self._places = places.reshape(-1, 2)

    @classmethod
    def open(cls, path: str | Path, *, verify_all: bool = False) -> TargetCache:
        """Open a targets.json and the shards it names.

        Args:
            path: the file.
            verify_all: check every byte now; else each shard's when it is first read.

        Raises:
            MissingFileError, StoreError, MissingTargetError: names the file or key.
        """
        path = Path(path)
        binding = Binding.load(path)
        place = binding.store
        if "://" not in place:
            place = str(path.resolve().parent / place)
        storage = open_storage(place)
        for shard in binding.shards:
            if not storage.has(f"shards/{shard}/shard.json"):
                raise StoreError(
                    f"{path}: expected shard {shard} in {place}, found none; run `pact-offline "
                    "score` again to fill the gap"
                )
        store = Store(place, binding.shards)
        if store.identity != binding.identity:
            raise StoreError(f"{path}: identity: expected that of {place}, found another")
        if verify_all:
            store.verify()
        return cls(path, binding, store, hashlib.sha256(path.read_bytes()).hexdigest())

    def __len__(self) -> int:
        return len(self._places)

    @property
    def safety_ids(self) -> list[int]:
        return list(self.binding.identity.safety_ids)

    def __getitem__(self, index: int) -> Targets:
        """Targets of example `index`."""
        return Targets(*(self._store.read([place]) for place in self._places[index]))

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        return self._store.read(self._places[list(indices), CONTEXT_KINDS.index(kind)])

    def check_model(self, model: ModelFiles) -> None:
        """Refuse a model that is not the reference that was scored."""
        if model.identity != self.binding.identity.reference:
            raise TargetsMismatchError(
                f"{self.path}: expected targets of the model {model.name}, found those of another "
                f"({_describe(self.binding.identity.reference)}); run `pact-offline score` for it"
            )

    def check_safety_ids(self, ids: Sequence[int], source: str) -> None:
        """Refuse safety tokens with other ids."""
        if list(ids) != self.safety_ids:
            raise TargetsMismatchError(
                f"{self.path}: expected targets of the {len(ids)} safety ids in {source}, found "
                f"those of {len(self.safety_ids)} others; run `pact-offline score` with them"
            )

    def check_examples(self, examples: Sequence[TokenizedExample], origins: Sequence[str]) -> None:
        """Refuse rows, an order, or a tokenizer that gives other contexts than were scored."""
        if len(examples) != len(self):
            raise TargetsMismatchError(
                f"{self.path}: expected targets of {len(examples)} rows, found {len(self)}"
            )
        header = self.binding.identity.header_ids
        for example, origin, keys in zip(examples, origins, self.binding.examples, strict=True):
            if "".join(context.key for context in contexts_of(example, header)) != keys:
                raise TargetsMismatchError(
                    f"{origin}: expected the row that was scored for {self.path}, found other "
                    "tokens (another row, order, tokenizer, chat template or --max-tokens); run "
                    "`pact-offline score` for these rows"
                )


def _read_at(handle: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # not moved by another process that shares the handle
        return os.pread(handle, count, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)


def _describe(reference: dict[str, str]) -> str:
    if "hub" in reference:
        return f"{reference['hub']} at {reference.get('commit', '?')[:12]}"
    return ", ".join(f"{name} {digest:.12}" for name, digest in sorted(reference.items())[-1:])

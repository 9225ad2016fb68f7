"""Reading stores and the bindings to them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pact_offline.cache.identity import Identity
from pact_offline.cache.shard import (
    SIDECAR,
    Sidecar,
    check_shard_id,
    read_array,
    read_contexts,
    read_sidecar,
    verify_shard,
)
from pact_offline.config import read_text
from pact_offline.conversations import (
    CONTEXT_KINDS,
    ContextKind,
    TokenizedExample,
    contexts_of,
)
from pact_offline.errors import MissingTargetError, StoreError, TargetsMismatchError
from pact_offline.files import sha256_file, write_json
from pact_offline.hub import ModelFiles

FORMAT_VERSION = 1
_MEMORY = 400 << 20  # bytes of decoded shards that a reader keeps


class Place(NamedTuple):
    """Where a context's steps are."""

    shard: str
    first: int
    steps: int


class Targets(NamedTuple):
    """Reference log-confidences of one example, float32 [steps, safety ids] each."""

    full: np.ndarray
    response_only: np.ndarray | None


class Store:
    """A directory of committed shards of one identity, read-only."""

    def __init__(self, path: Path, shards: Sequence[str] | None = None) -> None:
        """Open a store, or only some of its shards.

        Raises:
            StoreError: not a store, or a shard is damaged.
        """
        self.path = path
        self.identity = Identity.load(path / "identity.json")
        self.sidecars: dict[str, Sidecar] = {}
        self._places: dict[bytes, Place] = {}
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()
        for shard in shards if shards is not None else list_shards(path):
            self._read(shard)

    def _read(self, shard: str) -> None:
        folder = self.path / "shards" / shard
        sidecar = read_sidecar(folder)
        if sidecar.identity != self.identity.digest:
            raise StoreError(f"{folder}: expected a shard of this store, found one of another")
        self.sidecars[shard] = sidecar
        table = read_contexts(folder, sidecar)
        columns = (table[name].to_pylist() for name in ("key", "first_step", "steps"))
        for key, first, steps in zip(*columns, strict=True):
            self._places.setdefault(key, Place(shard, first, steps))

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def place(self, key: str) -> Place:
        """Where a context is; `MissingTargetError` where it is not."""
        try:
            return self._places[bytes.fromhex(key)]
        except (KeyError, ValueError):
            raise MissingTargetError(f"{self.path}: no target for context {key:.40}") from None

    def log_confidences(self, key: str) -> np.ndarray:
        """A context's log-confidences, float32 [steps, safety ids].

        The bytes of a shard are checked before its first value is used.
        """
        place = self.place(key)
        array = self._arrays.get(place.shard)
        if array is None:
            array = self._load(place.shard)
        self._arrays.move_to_end(place.shard)
        return array[place.first : place.first + place.steps].astype(np.float32)

    def verify(self, shard: str) -> None:
        """Check every byte of one shard; `StoreError` names the file."""
        verify_shard(self.path / "shards" / shard, self.sidecars[shard])

    def _load(self, shard: str) -> np.ndarray:
        self.verify(shard)
        array = read_array(
            self.path / "shards" / shard,
            self.sidecars[shard],
            len(self.identity.safety_ids),
            self.identity.stored_dtype,
        )
        self._arrays[shard] = array
        while len(self._arrays) > 1 and sum(a.nbytes for a in self._arrays.values()) > _MEMORY:
            self._arrays.popitem(last=False)
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": OrderedDict()}  # each loader process decodes its own


def list_shards(store: Path) -> list[str]:
    """Ids of the committed shards, sorted."""
    folder = store / "shards"
    if not folder.is_dir():
        return []
    return sorted(
        check_shard_id(entry.name, str(folder))
        for entry in folder.iterdir()
        if (entry / SIDECAR).is_file()
    )


@dataclass(frozen=True)
class Binding:
    """`targets.json`: a dataset bound to the shards that hold its targets.

    Attributes:
        store: directory of the store, relative to the file or absolute.
        identity: of the store.
        tokenizer: fingerprint of the vocabulary.
        max_tokens: rows were cut at this many.
        examples: context keys in dataset order, in the order of CONTEXT_KINDS.
        shards: shard id to SHA-256 of its sidecar.
        rows: sources and their row counts.
        provenance: recorded, determines no value.
    """

    store: str
    identity: Identity
    tokenizer: str
    max_tokens: int
    examples: tuple[tuple[str, str], ...]
    shards: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    provenance: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write the binding; the store's path is kept relative where that is possible."""
        store = os.path.relpath(Path(self.store).resolve(), path.resolve().parent)
        write_json(
            path,
            {
                **self.__dict__,
                "store": Path(store).as_posix(),
                "identity": self.identity.to_dict(),
            },
        )

    @classmethod
    def load(cls, path: Path) -> Binding:
        """Read and check targets.json; `StoreError` names the key that is wrong."""
        try:
            value = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}:{error.lineno}: expected JSON, found: {error.msg}") from None
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or set(value) != names:
            raise StoreError(f"{path}: expected the keys of a targets.json, found otherwise")
        if value["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format_version: expected {FORMAT_VERSION}, "
                f"found {value['format_version']!r:.40}"
            )
        kinds = {"store": str, "tokenizer": str, "max_tokens": int, "examples": list}
        for key, kind in {**kinds, "shards": dict, "rows": list, "provenance": dict}.items():
            if not isinstance(value[key], kind):
                raise StoreError(
                    f"{path}: {key}: expected {kind.__name__}, found {value[key]!r:.40}"
                )
        for shard in value["shards"]:
            check_shard_id(shard, f"{path}: shards")
        for index, keys in enumerate(value["examples"]):
            right = isinstance(keys, list) and len(keys) == len(CONTEXT_KINDS)
            if not right or not all(isinstance(key, str) and len(key) == 32 for key in keys):
                raise StoreError(f"{path}: examples[{index}]: expected two context keys")
        value["identity"] = Identity.from_dict(value["identity"], f"{path}: identity")
        value["examples"] = tuple((full, only) for full, only in value["examples"])
        value["rows"] = tuple(value["rows"])
        return cls(**value)


class TargetCache:
    """The targets of one dataset, by example index.

    Opened with `TargetCache.open`. Safe to hand to data-loader workers.
    """

    def __init__(self, path: Path, binding: Binding, store: Store, sha256: str) -> None:
        self.path, self.binding, self._store, self.sha256 = path, binding, store, sha256

    @classmethod
    def open(cls, path: str | Path, *, verify_all: bool = False) -> TargetCache:
        """Open a targets.json and the shards it names.

        Args:
            path: the file.
            verify_all: check every byte now; else each shard's when it is first read.

        Raises:
            MissingFileError, StoreError: names the file or key.
        """
        path = Path(path)
        binding = Binding.load(path)
        place = path.resolve().parent / binding.store
        if not (place / "identity.json").is_file():
            raise StoreError(f"{path}: store: expected a store at {place}, found none")
        for shard, expected in binding.shards.items():
            sidecar = place / "shards" / shard / SIDECAR
            if not sidecar.is_file():
                raise StoreError(
                    f"{path}: expected shard {shard} in {place}, found none; run `pact-offline "
                    "score` again to fill the gap"
                )
            if sha256_file(sidecar) != expected:
                raise StoreError(f"{sidecar}: expected the sidecar that was bound, found another")
        store = Store(place, list(binding.shards))
        if store.identity != binding.identity:
            raise StoreError(f"{path}: identity: expected that of {place}, found another")
        for keys in binding.examples:
            for key in keys:
                store.place(key)
        if verify_all:
            for shard in binding.shards:
                store.verify(shard)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(path, binding, store, digest)

    def __len__(self) -> int:
        return len(self.binding.examples)

    @property
    def safety_ids(self) -> list[int]:
        return list(self.binding.identity.safety_ids)

    def __getitem__(self, index: int) -> Targets:
        """Targets of example `index`."""
        return Targets(*(self._store.log_confidences(key) for key in self.binding.examples[index]))

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        place, examples = CONTEXT_KINDS.index(kind), self.binding.examples
        parts = [self._store.log_confidences(examples[index][place]) for index in indices]
        return np.concatenate(parts)

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
            if tuple(context.key for context in contexts_of(example, header)) != keys:
                raise TargetsMismatchError(
                    f"{origin}: expected the row that was scored for {self.path}, found other "
                    "tokens (another row, order, tokenizer, chat template or --max-tokens); run "
                    "`pact-offline score` for these rows"
                )


def _describe(reference: dict[str, str]) -> str:
    if "hub" in reference:
        return f"{reference['hub']} at {reference.get('commit', '?')[:12]}"
    return ", ".join(f"{name} {digest:.12}" for name, digest in sorted(reference.items())[-1:])

"""targets.json: a dataset bound to a store, and its targets by row."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pact_offline.cache.format import check_shard_id, is_committed, is_pair, join_pair, split_pair
from pact_offline.cache.identity import Identity
from pact_offline.cache.storage import is_local, open_storage
from pact_offline.cache.store import Store
from pact_offline.errors import MissingTargetError, StoreError, TargetsMismatchError
from pact_offline.files import read_json, write_json
from pact_offline.models.locate import ModelFiles
from pact_offline.rows.contexts import CONTEXT_KINDS, ContextKind, TokenizedExample, contexts_of

FORMAT_VERSION = 2
_STORE_NAME = re.compile(r"(?!\.+$)[\w. -]+")


class Targets(NamedTuple):
    """Reference log-confidences of one example, float32 [steps, safety ids] each."""

    full: np.ndarray
    response_only: np.ndarray


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
            if not is_pair(keys):
                raise StoreError(f"{path}: examples[{index}]: expected two context keys")
        value["identity"] = Identity.from_dict(value["identity"], f"{path}: identity")
        for key in ("examples", "shards", "rows"):
            value[key] = tuple(value[key])
        return cls(**value)

    def keys(self) -> list[str]:
        """Every row's two keys, one after the other."""
        return [key for pair in self.examples for key in split_pair(pair)]


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
    def open(
        cls, path: str | Path, *, verify_all: bool = False, cache: str | Path | None = None
    ) -> TargetCache:
        """Open a targets.json and the shards it names.

        Args:
            path: the file.
            verify_all: check every byte now; else each shard's when it is first read.
            cache: the cache that its store lies in, or the store; a URL in the file is followed
                only into this one.

        Raises:
            MissingFileError, StoreError, MissingTargetError: names the file or key.
        """
        path = Path(path)
        binding = Binding.load(path)
        place = store_place(binding.store, path, cache)
        storage = open_storage(place)
        for shard in binding.shards:
            if not is_committed(storage, shard):
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
            if join_pair(*(context.key for context in contexts_of(example, header))) != keys:
                raise TargetsMismatchError(
                    f"{origin}: expected the row that was scored for {self.path}, found other "
                    "tokens (another row, order, tokenizer, chat template or --max-tokens); run "
                    "`pact-offline score` for these rows"
                )


def store_place(store: str, path: Path, cache: str | Path | None) -> str:
    """The place of the store that a targets.json names: on a disk, or in a cache the user named.

    Raises:
        StoreError: a URL elsewhere.
    """
    if is_local(store):
        return store if "://" in store else str(path.resolve().parent / store)
    allowed = "" if cache is None else str(cache).rstrip("/")
    name = store.removeprefix(f"{allowed}/")
    if store == allowed or (name != store and _STORE_NAME.fullmatch(name)):
        return store
    raise StoreError(
        f"{path}: store: expected a path, or a store in --cache, found the URL {store!r:.200}; "
        "`--cache URL` (cache= in Python) with the cache it lies in allows it"
    )


def _describe(reference: dict[str, str]) -> str:
    if "hub" in reference:
        return f"{reference['hub']} at {reference.get('commit', '?')[:12]}"
    return ", ".join(f"{name} {digest:.12}" for name, digest in sorted(reference.items())[-1:])

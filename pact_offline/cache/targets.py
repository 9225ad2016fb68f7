"""targets.json: a dataset bound to a store, and its targets by row."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pact_offline.cache.format import check_shard_id, is_committed
from pact_offline.cache.identity import Identity
from pact_offline.cache.row_keys import RowKeys, remove_keys
from pact_offline.cache.storage import is_local, open_storage
from pact_offline.cache.store import Store
from pact_offline.errors import (
    MissingTargetError,
    SettingError,
    StoreError,
    TargetsMismatchError,
)
from pact_offline.files import read_json, write_json
from pact_offline.models.locate import ModelFiles, is_same_model
from pact_offline.rows.contexts import CONTEXT_KINDS, ContextKind
from pact_offline.rows.tokenized import TokenizedRows
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.stages import CHAT_ALIKE, RowSettings

FORMAT_VERSION = 4
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
        template: SHA-256 over the chat template.
        settings: how rows became tokens: `RowSettings`, without the places of files.
        keys: of each row; in an Arrow file beside this one, which it names by SHA-256.
        shards: ids of the shards that hold them; an id is the start of a sidecar's SHA-256.
        rows: sources, how many rows each had, and how many were left out.
        provenance: recorded, determines no value.
    """

    store: str
    identity: Identity
    tokenizer: str
    template: str
    settings: dict[str, Any]
    keys: RowKeys
    shards: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    provenance: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write the binding; a local store's path is kept relative to it."""
        store = self.store
        if "://" not in store:
            store = Path(os.path.relpath(Path(store).resolve(), path.parent.resolve())).as_posix()
        digest = self.keys.save(path)
        write_json(
            path,
            {
                **self.__dict__,
                "store": store,
                "identity": self.identity.to_dict(),
                "keys": digest,
            },
        )
        remove_keys(path, but=digest)

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
        kinds = {"store": str, "tokenizer": str, "template": str, "settings": dict, "keys": str}
        for key, kind in {**kinds, "shards": list, "rows": list, "provenance": dict}.items():
            if not isinstance(value[key], kind):
                raise StoreError(
                    f"{path}: {key}: expected {kind.__name__}, found {value[key]!r:.40}"
                )
        if not re.fullmatch("[0-9a-f]{64}", value["keys"]):
            raise StoreError(f"{path}: keys: expected a SHA-256, found {value['keys']!r:.40}")
        for shard in value["shards"]:
            check_shard_id(shard, f"{path}: shards")
        value["identity"] = Identity.from_dict(value["identity"], f"{path}: identity")
        try:
            value["settings"] = parse_settings(RowSettings, value["settings"], "settings")
        except SettingError as error:
            raise StoreError(f"{path}: {error}") from None
        value["settings"] = row_settings(value["settings"])
        value["keys"] = RowKeys.load(path, value["keys"])
        for key in ("shards", "rows"):
            value[key] = tuple(value[key])
        return cls(**value)

    @property
    def digest(self) -> str:
        """SHA-256 over what a training takes from it, 64 hex digits: the same rows that are scored
        again by the same model, in whatever shards, have the same."""
        parts = [self.identity.digest, self.keys.digest, self.tokenizer, self.template]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def row_settings(self) -> RowSettings:
        """How rows became tokens, but for the chat template, which `template` names."""
        return parse_settings(RowSettings, self.settings, "settings")


def row_settings(settings: RowSettings) -> dict[str, Any]:
    """What is kept of the settings that turn rows into tokens: not where a file lies."""
    kept = {*RowSettings.model_fields} - {"chat_template"}
    return {**settings.model_dump(mode="json", include=kept)}


class TargetCache:
    """The targets of one dataset, by example index.

    Opened with `TargetCache.open`. Safe to hand to data-loader workers.
    """

    def __init__(self, path: Path, binding: Binding, store: Store, sha256: str) -> None:
        self.path, self.binding, self._store, self.sha256 = path, binding, store, sha256
        keys = binding.keys
        self._places, self._starts, self._ends = store.find(keys.keys), keys.starts, keys.ends
        if (self._places < 0).any():
            missing = int(np.argmax(self._places < 0))
            row = int(np.searchsorted(self._ends, missing, side="right"))
            kind = CONTEXT_KINDS[int(missing > self._starts[row])]
            raise MissingTargetError(
                f"{path}: row {row}: expected its {kind} context in {store.place}, found none; run "
                "`pact-offline score` to fill the gap"
            )

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
        return len(self._ends)

    @property
    def safety_ids(self) -> list[int]:
        return list(self.binding.identity.safety_ids)

    @cached_property
    def turn_steps(self) -> np.ndarray:
        """Response steps of each turn, one row after the other, int64 [turns of all rows]."""
        is_turn = np.ones(len(self._places), bool)
        is_turn[self._starts] = False
        return np.asarray(self._store.steps[self._places[is_turn]])

    def _at(self, index: int, kind: ContextKind) -> np.ndarray:
        start = self._starts[index]
        if kind == "full":
            return self._places[start : start + 1]
        return self._places[start + 1 : self._ends[index]]

    def __getitem__(self, index: int) -> Targets:
        """Targets of example `index`."""
        return Targets(self.read([index], "full"), self.read([index], "response_only"))

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids].

        The steps of an example are those of all its turns, in both kinds of context.
        """
        return self._store.read(np.concatenate([self._at(index, kind) for index in indices]))

    def read_contexts(self, keys: pa.FixedSizeBinaryArray) -> np.ndarray:
        """Log-confidences of some contexts by their keys, one after the other; as `read`."""
        return self._store.read(self._store.find(keys))

    def read_labels(self, indices: Sequence[int], kind: ContextKind = "full") -> np.ndarray:
        """The reference's log-probabilities of the responses' own tokens, float32 [steps]."""
        return self._store.read_labels(np.concatenate([self._at(i, kind) for i in indices]))

    @property
    def is_rehearsal(self) -> bool:
        """Whether they are of the reference's own answers."""
        return "rehearsal" in self.binding.provenance

    @property
    def _made_by(self) -> str:
        return f"`pact-offline {'rehearse' if self.is_rehearsal else 'score'}`"

    def check_model(self, model: ModelFiles) -> None:
        """Refuse a model that is not the reference that was scored."""
        if not is_same_model(model.identity, self.binding.identity.reference):
            raise TargetsMismatchError(
                f"{self.path}: expected targets of the model {model.name}, found those of another "
                f"({_describe(self.binding.identity.reference)}); run {self._made_by} for it"
            )

    def check_safety_ids(self, ids: Sequence[int], source: str) -> None:
        """Refuse safety tokens with other ids."""
        if list(ids) != self.safety_ids:
            raise TargetsMismatchError(
                f"{self.path}: expected targets of the {len(ids)} safety ids in {source}, found "
                f"those of {len(self.safety_ids)} others; run {self._made_by} with them"
            )

    def check_chat(self, template: str, kwargs: dict[str, Any]) -> None:
        """Refuse another chat template than the rows were scored with, or other variables of it.

        Args:
            template: SHA-256 over the chat template.
            kwargs: its variables.
        """
        theirs = self.binding.template, self.binding.settings["chat_template_kwargs"]
        if theirs != (template, kwargs):
            raise TargetsMismatchError(
                f"{self.path}: expected targets of the chat template sha256 {template:.12} and "
                f"variables {kwargs}, found those of {theirs[0]:.12} and {theirs[1]}; "
                f"{CHAT_ALIKE}"
            )

    def check_rows(self, rows: TokenizedRows, settings: RowSettings) -> None:
        """Refuse rows, an order, or a tokenizer that gives other contexts than were scored.

        Args:
            rows: tokenized.
            settings: that they were tokenized with; where they differ, the message says so.
        """
        ours = row_settings(settings)
        told = "".join(
            f"; --{name.replace('_', '-')} was {value!r} then, and is {ours[name]!r}"
            for name, value in self.binding.settings.items()
            if value != ours[name]
        )
        if len(rows) != len(self):
            raise TargetsMismatchError(
                f"{self.path}: expected targets of {len(rows)} rows, found {len(self)}{told}"
            )
        different = self.binding.keys.first_difference(keys_of(rows))
        if different is not None:
            raise TargetsMismatchError(
                f"{rows.origin(different)}: expected the row that was scored for {self.path}, "
                "found other tokens (another row, order, tokenizer or setting of the rows); run "
                f"{self._made_by} {'again' if self.is_rehearsal else 'for these rows'}{told}"
            )


def keys_of(rows: TokenizedRows) -> RowKeys:
    """The keys of tokenized rows."""
    return RowKeys(
        rows.keys, rows.key_ends, rows.sources.astype(np.int32), rows.places, rows.scaffolds
    )


def answers_place(targets: Path) -> Path:
    """Where the rows of a targets.json of `pact-offline rehearse` lie: beside it."""
    return targets.with_name(f"{targets.name.removesuffix('.json')}.answers.jsonl")


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

"""Filling a store: any number of writers, one shard each at a time."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pact_offline.cache.format import IDENTITY_FILE, SIDECAR, is_committed, shard_folder
from pact_offline.cache.identity import Identity, read_identity
from pact_offline.cache.leases import marked_shards
from pact_offline.cache.shard import Shard, shard_files
from pact_offline.cache.storage import open_storage
from pact_offline.errors import DamagedError, ScoringError, StoreError
from pact_offline.rows.contexts import Context


class StoreWriter:
    """Collects scored contexts and commits a shard whenever `shard_steps` are full.

    A context manager: leaving it commits what is collected, also after Ctrl-C or an error, since
    every context added is whole. A killed writer loses its open shard at most.
    """

    def __init__(
        self, store: str | Path, identity: Identity, shard_steps: int, provenance: dict[str, Any]
    ) -> None:
        """Make the store, or join it.

        Raises:
            StoreError: the place cannot be written to, or is another store.
        """
        self._storage, self._identity = open_storage(store), identity
        self._shard_steps, self._provenance = shard_steps, provenance
        self._keys: list[str] = []
        self._kinds: list[str] = []
        self._values: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._steps = 0
        self.shards: list[str] = []
        if not self._storage.has(IDENTITY_FILE):
            self._storage.write(IDENTITY_FILE, identity.to_bytes())
        if read_identity(self._storage) != identity:
            raise StoreError(
                f"{store}: expected the identity {identity.digest:.12}, found another; store "
                "directories are named by their identity, was this one renamed?"
            )

    def add(self, context: Context, log_confidences: np.ndarray, labels: np.ndarray) -> None:
        """Keep one scored context: [steps, safety ids], and of the response's own tokens [steps].

        Raises:
            ScoringError: another shape than the context asks for, or a NaN.
            StoreError: the shard could not be written.
        """
        expected = (context.steps, len(self._identity.safety_ids))
        if log_confidences.shape != expected:
            raise ScoringError(
                f"context {context.key}: expected log-confidences {list(expected)}, "
                f"found {list(log_confidences.shape)}"
            )
        if labels.shape != expected[:1]:
            raise ScoringError(
                f"context {context.key}: expected log-probabilities of {context.steps} tokens, "
                f"found {list(labels.shape)}"
            )
        if np.isnan(log_confidences).any() or np.isnan(labels).any():
            raise ScoringError(f"context {context.key}: expected log-confidences, found NaN")
        self._keys.append(context.key)
        self._kinds.append(context.kind)
        self._values.append(log_confidences)
        self._labels.append(labels)
        self._steps += context.steps
        if self._steps >= self._shard_steps:
            self.commit()

    def commit(self) -> None:
        """Write the open shard aside and make it appear at once."""
        if not self._keys:
            return
        held = self._keys, self._kinds, self._values, self._labels
        self._keys, self._kinds, self._values, self._labels, self._steps = [], [], [], [], 0
        try:
            shard_id = self._commit(*held)
        except (OSError, StoreError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StoreError(
                f"{self._storage.url}: shard not written: {reason}; what was committed before is "
                "safe, and the same command goes on from there"
            ) from None
        self.shards.append(shard_id)

    def _commit(
        self,
        keys: list[str],
        kinds: list[str],
        values: list[np.ndarray],
        labels: list[np.ndarray],
    ) -> str:
        """The id of the shard that holds them: this writer's, or another's of the same bytes.

        What lies under an id is never replaced, or whoever is removing it could remove the new one.
        A shard whose id is taken by what is not whole says so, and thus gets another.
        """
        provenance = self._provenance
        while True:
            shard_id, files = shard_files(
                keys, kinds, values, labels, identity=self._identity, provenance=provenance
            )
            target = shard_folder(shard_id)
            is_taken = bool(self._storage.names(target))
            is_marked = shard_id in marked_shards(self._storage)
            if is_taken and not is_marked and self._is_whole(shard_id):
                return shard_id
            if is_taken or is_marked:
                provenance = {**provenance, "instead_of": shard_id}
                continue
            try:
                self._storage.commit(target, files, last=SIDECAR)
            except StoreError:
                if not is_committed(self._storage, shard_id):
                    raise
            else:
                self._require_kept(shard_id)
                return shard_id

    def _require_kept(self, shard_id: str) -> None:
        """Look that nobody took this writer for dead, and its files for leftovers."""
        is_marked = shard_id in marked_shards(self._storage)
        if is_marked or not is_committed(self._storage, shard_id):
            raise StoreError("it was removed meanwhile, as by `pact-offline cache gc`")
        Shard(self._storage, shard_id, self._identity).require_files()

    def _is_whole(self, shard_id: str) -> bool:
        try:
            Shard(self._storage, shard_id, self._identity).verify()
        except DamagedError:
            return False
        finally:
            self._storage.release(shard_folder(shard_id))
        return True

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, StoreError):
            self.commit()

"""Filling a store: any number of writers, one shard each at a time."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pact_offline.cache.identity import Identity
from pact_offline.cache.shard import write_shard
from pact_offline.conversations import Context
from pact_offline.errors import ScoringError, StoreError
from pact_offline.files import write_json


class StoreWriter:
    """Collects scored contexts and commits a shard whenever `shard_steps` are full.

    A context manager: leaving it commits what is collected, also after Ctrl-C or an error, since
    every context added is whole. A killed writer loses its open shard at most.
    """

    def __init__(
        self, store: Path, identity: Identity, shard_steps: int, provenance: dict[str, Any]
    ) -> None:
        """Make the store, or join it.

        Raises:
            StoreError: the place cannot be written to, or is another store.
        """
        self._store, self._identity = store, identity
        self._shard_steps, self._provenance = shard_steps, provenance
        self._keys: list[str] = []
        self._kinds: list[str] = []
        self._values: list[np.ndarray] = []
        self._steps = 0
        self.shards: list[str] = []
        try:
            (store / "shards").mkdir(parents=True, exist_ok=True)
            (store / "open").mkdir(exist_ok=True)
            described = store / "identity.json"
            if not described.exists():
                write_json(described, identity.to_dict())
        except (OSError, ValueError) as error:
            raise StoreError(f"{store}: cannot be written: {error}") from None
        if Identity.load(described) != identity:
            raise StoreError(f"{described}: expected {identity.digest:.12}, found another identity")

    def add(self, context: Context, log_confidences: np.ndarray) -> None:
        """Keep one scored context, [steps, safety ids].

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
        if np.isnan(log_confidences).any():
            raise ScoringError(f"context {context.key}: expected log-confidences, found NaN")
        self._keys.append(context.key)
        self._kinds.append(context.kind)
        self._values.append(log_confidences)
        self._steps += context.steps
        if self._steps >= self._shard_steps:
            self.commit()

    def commit(self) -> None:
        """Write the open shard aside and make it appear by one rename."""
        if not self._keys:
            return
        keys, kinds, values = self._keys, self._kinds, self._values
        self._keys, self._kinds, self._values, self._steps = [], [], [], 0
        shard_id = uuid.uuid4().hex
        aside = self._store / "open" / shard_id
        try:
            write_shard(
                aside,
                keys,
                kinds,
                values,
                identity=self._identity.digest,
                stored_dtype=self._identity.stored_dtype,
                provenance=self._provenance,
            )
            aside.rename(self._store / "shards" / shard_id)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise StoreError(
                f"{self._store}: shard not written: {error.strerror or error}; what was committed "
                "before is safe, and the same command goes on from there"
            ) from None
        self.shards.append(shard_id)

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

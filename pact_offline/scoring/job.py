"""A dataset at the store that its contexts belong to, while a process scores and binds it."""

from __future__ import annotations

import hashlib
import logging
from types import TracebackType

import numpy as np

from pact_offline.cache.format import IDENTITY_FILE, shard_ids, strays
from pact_offline.cache.leases import Lease, marked_shards
from pact_offline.cache.storage import open_storage
from pact_offline.cache.store import Store
from pact_offline.errors import DamagedError
from pact_offline.scoring.dataset import Dataset

log = logging.getLogger(__name__)


class ScoringJob:
    """Holds a lease on the store, and the store open, from the first look to the binding.

    A context manager. The lease of a part stands when it is done, for the job that binds it.

    Attributes:
        dataset: what is scored.
        part: (i, n), the i-th of n parts, split by context key; (1, 1) for all of it.
        store: its whole shards; None while there is no store.
        lease: keeps `cache gc` away.
    """

    def __init__(self, dataset: Dataset, part: tuple[int, int] | None = None) -> None:
        """Name the job; entering it opens the store.

        Args:
            dataset: from `prepare`.
            part: of a job that only scores, and leaves the binding to another.
        """
        self.dataset, self.part = dataset, part or (1, 1)
        self._is_part = part is not None
        self._storage = open_storage(dataset.store)
        self.store: Store | None = None
        digest = hashlib.sha256(dataset.keys.data).hexdigest()[:32]
        rows = ", ".join(facts.source for facts in dataset.rows.facts)
        what = f"score {rows}" + (f" --part {self.part[0]}/{self.part[1]}" if part else "")
        self.lease = Lease(self._storage, digest, what)

    def __enter__(self) -> ScoringJob:
        if self._storage.has(IDENTITY_FILE):
            self.lease.take()
            try:
                marks = marked_shards(self._storage)
                known = [shard for shard in shard_ids(self._storage) if shard not in marks]
                damaged: list[DamagedError] = []
                self.store = Store(self.dataset.store, known, leave_out=damaged.append)
                self._warn(damaged)
            except BaseException:
                self.lease.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.lease.release(is_part=self._is_part and error is None)

    def missing(self) -> np.ndarray:
        """Which of the dataset's distinct contexts the store does not hold, int64, in order."""
        if self.store is None:
            return np.arange(len(self.dataset.distinct))
        return np.flatnonzero(self.store.find(self.dataset.distinct_keys) < 0)

    def add(self, shards: list[str]) -> None:
        """Know the contexts of shards that this job has written."""
        if self.store is None:
            self.store = Store(self.dataset.store, shards)
        else:
            known = {shard.id for shard in self.store.shards}
            self.store.add([shard for shard in shards if shard not in known])

    def _warn(self, damaged: list[DamagedError]) -> None:
        for line in (*damaged, *strays(self._storage)):
            log.warning("%s", line)
        if damaged:
            log.warning(
                "%d damaged shards are left out, and scored again where they are needed; "
                "`pact-offline cache verify %s --repair` drops them",
                len(damaged), self.dataset.store,
            )  # fmt: skip

"""Who works on a store, and what is being removed from it.

Both are small files in the store, written again and again while their process lives, so that their
age says whether it does. A job takes a lease and then looks at the store; a removal marks what it
takes and then looks at leases and bindings. Of two at once, at least one sees the other.

Ages save work and waiting. That no binding is broken does not hang on them: a shard that is marked
is bound by nobody, however old the mark.
"""

from __future__ import annotations

import datetime
import json
import logging
import platform
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Event, Thread
from time import sleep
from typing import Any, TypeVar

from pact_offline.cache.format import check_shard_id
from pact_offline.cache.storage import Storage
from pact_offline.errors import DamagedError, PactError, StoreError

log = logging.getLogger(__name__)

_LEASES, _REMOVALS = "leases", "removals"
_NAME = re.compile(r"([0-9a-f]{32}-)?[0-9a-f]{32}\.json")
_MAX_BYTES = 16 << 20
_JOB_LIFE, _PART_LIFE, _REMOVAL_LIFE = 3600.0, 7 * 24 * 3600.0, 300.0
_BEATS = 10  # times that a file is written in a life, so that some may fail
_PAUSE = 1.0


@dataclass(frozen=True)
class Holder:
    """A lease.

    Attributes:
        job: what holds it, in words.
        machine: where.
        since: when it was taken.
        is_part: of a part that is done, whose binding is to come: it holds for a week.
    """

    job: str
    machine: str
    since: str
    is_part: bool = False

    @property
    def life(self) -> float:
        """Seconds that it holds since it was last written."""
        return _PART_LIFE if self.is_part else _JOB_LIFE


@dataclass(frozen=True)
class _Removal:
    by: str
    machine: str
    since: str
    shards: tuple[str, ...]
    life = _REMOVAL_LIFE


class _Kept:
    """A file that is written again and again until it is stopped."""

    def __init__(self, storage: Storage, name: str, value: Holder | _Removal) -> None:
        self._storage, self._name, self._every = storage, name, value.life / _BEATS
        self._data = _to_bytes(value)
        self._is_over = Event()
        storage.write(name, self._data)
        self._thread = Thread(target=self._beat, name=name, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._is_over.wait(self._every):
            with suppress(PactError):  # the next one may go through
                self._storage.write(self._name, self._data)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()  # or it could write the file after its removal


class Lease:
    """Keeps `cache gc` from a store while a job works for one dataset."""

    def __init__(self, storage: Storage, dataset: str, job: str) -> None:
        """Name it; `take` takes it.

        Args:
            storage: of the store.
            dataset: 32 hex digits, the same for every job of a dataset.
            job: what it is for, in words.
        """
        self._storage, self._dataset = storage, dataset
        self._name = f"{_LEASES}/{dataset}-{uuid.uuid4().hex}.json"
        self._holder = Holder(job, platform.node(), _now())
        self._kept: _Kept | None = None

    def take(self) -> None:
        """Write it, and keep it fresh; before the job looks at the store.

        In a store that cannot be written to, a warning stands for it: what is there can still be
        bound, and a binding is checked again after it is recorded.
        """
        if self._kept is not None:
            return
        try:
            self._kept = _Kept(self._storage, self._name, self._holder)
        except PactError as error:
            log.warning("%s; without a lease, `cache gc` may remove what this job needs", error)

    def release(self, *, is_part: bool = False) -> None:
        """Give it back; of a part whose binding is to come, leave it to stand instead."""
        if self._kept is None:
            return
        self._kept.stop()
        self._kept = None
        with suppress(PactError):  # it grows old by itself
            if is_part:
                holder = Holder(**{**asdict(self._holder), "is_part": True})
                self._storage.write(self._name, _to_bytes(holder))
            else:
                self._storage.remove_file(self._name)

    def end_parts(self) -> None:
        """Remove what the parts of the same dataset left to stand."""
        with suppress(PactError):
            for name, holder, _ in _read(self._storage, _LEASES, Holder):
                if holder.is_part and name.startswith(f"{_LEASES}/{self._dataset}-"):
                    self._storage.remove_file(name)


def users(storage: Storage) -> list[str]:
    """Who works on a store now, a line each: those whose lease holds.

    Raises:
        StoreError: a lease is damaged.
    """
    return [
        f"in use by {holder.job} on {holder.machine} since {holder.since} ({storage.url}/{name})"
        for name, holder, is_live in _read(storage, _LEASES, Holder)
        if is_live
    ]


@contextmanager
def marked(storage: Storage, shards: Sequence[str], by: str) -> Iterator[None]:
    """Mark shards for removal in this block: from now on nobody binds to them."""
    removal = _Removal(by, platform.node(), _now(), tuple(shards))
    name = f"{_REMOVALS}/{uuid.uuid4().hex}.json"
    kept = _Kept(storage, name, removal)
    try:
        yield
    finally:
        kept.stop()
        storage.remove_file(name)


def marked_shards(storage: Storage) -> set[str]:
    """Shards that nobody may bind to: a removal that was cut short has marked them.

    Waits for removals that are going on; they leave off where they see a lease.

    Raises:
        StoreError: a mark is damaged.
    """
    is_told = False
    while True:
        marks = list(_read(storage, _REMOVALS, _Removal))
        live = [mark for _, mark, is_live in marks if is_live]
        if not live:
            return {shard for _, mark, _ in marks for shard in mark.shards}
        if not is_told:
            log.info("waiting for %s on %s, since %s", live[0].by, live[0].machine, live[0].since)
            is_told = True
        sleep(_PAUSE)


def old_leases(storage: Storage) -> list[str]:
    """Names of the leases of jobs that ended without giving them back."""
    return [name for name, _, is_live in _read(storage, _LEASES, Holder) if not is_live]


def old_marks(storage: Storage) -> dict[str, tuple[str, ...]]:
    """Marks of removals that were cut short, by name, and the shards they were for."""
    marks = _read(storage, _REMOVALS, _Removal)
    return {name: mark.shards for name, mark, is_live in marks if not is_live}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _to_bytes(value: Holder | _Removal) -> bytes:
    return (json.dumps(asdict(value), indent=1) + "\n").encode()


_Sign = TypeVar("_Sign", Holder, _Removal)


def _read(storage: Storage, folder: str, kind: type[_Sign]) -> Iterator[tuple[str, _Sign, bool]]:
    """Name, content and whether its process lives, of each that is not taken back meanwhile."""
    for entry in storage.names(folder):
        name = f"{folder}/{entry}"
        if not _NAME.fullmatch(entry):
            continue  # one that another process is writing
        try:
            age = storage.age(name)  # first: what is gone is very old in some places
            data = storage.read(name, _MAX_BYTES)
        except DamagedError:
            if storage.has(name):
                raise
            continue
        sign = _parse(data, kind, f"{storage.url}/{name}")
        yield name, sign, age < sign.life


def _parse(data: bytes, kind: type[_Sign], source: str) -> _Sign:
    try:
        value: dict[str, Any] = json.loads(data)
        if kind is _Removal:
            shards = tuple(check_shard_id(shard, source) for shard in value["shards"])
            value = {**value, "shards": shards}
        return kind(**value)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(
            f"{source}: expected what a running job writes, found: {error}; where none runs, "
            "remove the file"
        ) from None

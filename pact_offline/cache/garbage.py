"""What nothing uses, and removing it."""

from __future__ import annotations

from typing import NamedTuple

from pact_offline.cache.bindings import usages
from pact_offline.cache.format import SHARDS, SIDECAR, is_shard_id, shard_folder, shard_ids
from pact_offline.cache.identity import read_identity
from pact_offline.cache.leases import marked, old_leases, old_marks, users
from pact_offline.cache.storage import OPEN, Storage
from pact_offline.errors import DamagedError


class Garbage(NamedTuple):
    """What no targets.json and no running job needs.

    Attributes:
        shards: ids of shards that nothing is bound to.
        records: names of the records of bindings that are gone.
        leftovers: folders of killed writers.
        signs: names of what killed processes left: leases, and marks of removals.
        size: bytes of shards and leftovers.
    """

    shards: list[str]
    records: list[str]
    leftovers: list[str]
    signs: list[str]
    size: int


class Removed(NamedTuple):
    """The shards that were removed, and who began to use the store meanwhile, which ended it."""

    shards: list[str]
    users: list[str]


def find_garbage(storage: Storage, *, forget_missing: bool, older_than: float) -> Garbage:
    """What `remove_garbage` would remove if nobody began to use the store.

    Args:
        storage: of one store.
        forget_missing: also forget bindings whose targets.json is gone from this machine.
        older_than: seconds; what is younger stays.

    Raises:
        StoreError: no store, or one that is damaged, of which nothing is known to be garbage.
    """
    read_identity(storage)
    known = usages(storage)
    forgotten = [name for name, usage in known.items() if forget_missing and usage.is_missing()]
    kept = [usage for name, usage in known.items() if name not in forgotten]
    needed = {shard for usage in kept for shard in usage.shards}
    marks = old_marks(storage)
    condemned = {shard for shards in marks.values() for shard in shards}
    listed, whole = storage.names(SHARDS), shard_ids(storage)  # in this order: one may appear
    leftovers = [shard_folder(name) for name in listed if name not in whole]
    leftovers += [f"{OPEN}/{name}" for name in storage.names(OPEN)]
    leftovers = [name for name in leftovers if is_shard_id(name.rpartition("/")[2])]
    places = {shard_folder(shard): shard for shard in whole if shard not in needed}
    found = {}
    for place in (*places, *leftovers):
        try:
            is_old = places.get(place) in condemned or storage.age(place) >= older_than
            if is_old:
                found[place] = storage.size(place)
        except DamagedError:
            if storage.names(place):
                raise  # not only removed by another meanwhile
    return Garbage(
        [places[place] for place in found if place in places],
        forgotten,
        [place for place in found if place not in places],
        [*old_leases(storage), *marks],
        sum(found.values()),
    )


def remove_garbage(storage: Storage, garbage: Garbage) -> Removed:
    """Remove records, shards and leftovers, until someone takes a lease.

    Before each removal, leases and bindings are looked at again: what was bound since it was found
    stays.
    """
    removed: list[str] = []
    ids = [*garbage.shards, *(name.rpartition("/")[2] for name in garbage.leftovers)]
    with marked(storage, ids, "cache gc"):
        for name in garbage.records:
            if found := users(storage):
                return Removed(removed, found)
            usage = usages(storage).get(name)
            if usage is not None and usage.is_missing():
                storage.remove_file(name)
        for shard in garbage.shards:
            if found := users(storage):
                return Removed(removed, found)
            if not _is_needed(storage, shard):
                storage.remove(shard_folder(shard), first=SIDECAR)
                removed.append(shard)
        for name in garbage.leftovers:
            if found := users(storage):
                return Removed(removed, found)
            if not storage.has(f"{name}/{SIDECAR}"):
                storage.remove(name, first=SIDECAR)
        _remove_signs(storage, garbage.signs)
    return Removed(removed, [])


def _is_needed(storage: Storage, shard: str) -> bool:
    return any(shard in usage.shards for usage in usages(storage).values())


def _remove_signs(storage: Storage, names: list[str]) -> None:
    """Remove what is still old; a mark only when none of its shards is there.

    The removal it is of may only have been held up, and go on to take what it decided on.
    """
    marks = old_marks(storage)
    for name in {*old_leases(storage), *marks}.intersection(names):
        if not any(storage.names(shard_folder(shard)) for shard in marks.get(name, ())):
            storage.remove_file(name)

"""What nothing uses, and removing it."""

from __future__ import annotations

from typing import NamedTuple

from pact_offline.cache.bindings import usages
from pact_offline.cache.format import SHARDS, SIDECAR, is_shard_id, shard_folder, shard_ids
from pact_offline.cache.storage import OPEN, Storage


class Garbage(NamedTuple):
    """What no targets.json needs: shards, forgotten records, and folders of killed writers."""

    shards: list[str]
    records: list[str]
    leftovers: list[str]
    size: int


def find_garbage(storage: Storage, *, forget_missing: bool, older_than: float) -> Garbage:
    """What `remove_garbage` would remove.

    Args:
        storage: of one store.
        forget_missing: also forget bindings whose targets.json is gone from this machine.
        older_than: seconds; what is younger stays: a writer may be at it, or a binding to come.
    """
    known = usages(storage)
    forgotten = [name for name, usage in known.items() if forget_missing and usage.is_missing()]
    kept = [usage for name, usage in known.items() if name not in forgotten]
    needed = {shard for usage in kept for shard in usage.shards}
    whole = shard_ids(storage)
    unused = [shard for shard in whole if shard not in needed]
    leftovers = [shard_folder(name) for name in storage.names(SHARDS) if name not in whole]
    leftovers += [f"{OPEN}/{name}" for name in storage.names(OPEN)]
    leftovers = [name for name in leftovers if is_shard_id(name.rpartition("/")[2])]
    shards = [shard for shard in unused if storage.age(shard_folder(shard)) >= older_than]
    leftovers = [name for name in leftovers if storage.age(name) >= older_than]
    size = sum(storage.size(name) for name in [*(shard_folder(s) for s in shards), *leftovers])
    return Garbage(shards, forgotten, leftovers, size)


def remove_garbage(storage: Storage, garbage: Garbage) -> list[str]:
    """Remove records, shards and leftovers.

    Returns:
        the shards that were removed: all but those that were bound in the meantime.
    """
    for name in garbage.records:
        storage.remove_file(name)
    removed = []
    for shard in garbage.shards:
        if not any(shard in usage.shards for usage in usages(storage).values()):
            storage.remove(shard_folder(shard), first=SIDECAR)
            removed.append(shard)
    for name in garbage.leftovers:
        storage.remove(name, first=SIDECAR)
    return removed

"""Listing stores, and checking every byte of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pact_offline.cache.bindings import usages
from pact_offline.cache.format import (
    SIDECAR,
    is_store,
    shard_folder,
    shard_ids,
    strays,
)
from pact_offline.cache.identity import Identity, read_identity
from pact_offline.cache.leases import marked
from pact_offline.cache.shard import Shard, unless_removed
from pact_offline.cache.storage import Storage, join, open_storage
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import DamagedError, MissingFileError, StoreError


def store_places(cache: str) -> list[str]:
    """The stores in a cache directory, whole or not, or the store itself.

    Raises:
        MissingFileError: no such directory.
    """
    storage = open_storage(cache)
    if is_store(storage):
        return [cache]
    if "://" not in cache and not Path(cache).is_dir():
        raise MissingFileError(f"{cache}: no such directory")
    places = [join(cache, name) for name in storage.names()]
    return [place for place in places if is_store(open_storage(place))]


def require_stores(cache: str) -> list[str]:
    """`store_places`, and at least one."""
    places = store_places(cache)
    if not places:
        raise MissingFileError(f"{cache}: expected a store or a directory of stores, found none")
    return places


def list_stores(cache: str) -> list[dict[str, Any]]:
    """Every store in a cache directory: name, counts, bytes, what made it and what uses it.

    Of one that cannot be read, the name and the error.
    """
    found = []
    for place in store_places(cache):
        name = place.rstrip("/").rsplit("/", 1)[-1]
        try:
            found.append({"name": name, **_describe(place)})
        except StoreError as error:
            found.append({"name": name, "error": str(error)})
    return found


def _describe(place: str) -> dict[str, Any]:
    storage = open_storage(place)
    identity, sidecars = read_identity(storage), []
    for name in shard_ids(storage):
        with unless_removed(storage, name):
            sidecars.append(Shard(storage, name, identity).sidecar)
    known = usages(storage).values()
    return {
        "shards": len(sidecars),
        "contexts": sum(sidecar.contexts for sidecar in sidecars),
        "steps": sum(sidecar.steps for sidecar in sidecars),
        "bytes": storage.size(""),
        "reference": identity.reference,
        "model": next((s.provenance.get("model") for s in sidecars), None),
        "engine": identity.engine,
        "compute_dtype": identity.compute_dtype,
        "stored_dtype": identity.stored_dtype,
        "used_by": [
            {"targets": usage.targets, "rows": usage.rows, "missing": usage.is_missing()}
            for usage in known
        ],
        "strays": strays(storage),
    }


class Verified(NamedTuple):
    """What a check found.

    Attributes:
        shards, contexts: counts of what is whole.
        bad: shards that are not, with the reason.
        strays: a line for each entry among the shards that is none.
    """

    shards: int
    contexts: int
    bad: dict[str, str]
    strays: list[str]


def verify_store(place: str) -> Verified:
    """Check every byte of a store.

    Raises:
        StoreError: its identity, its records of use, or the place itself cannot be read.
    """
    storage = open_storage(place)
    identity = read_identity(storage)
    if not _is_named_by(place, identity):
        raise StoreError(
            f"{place}: expected a directory name that ends with {identity.digest[:12]}, the "
            "store's identity, found another"
        )
    usages(storage)
    good, contexts, bad = 0, 0, {}
    for name in shard_ids(storage):
        try:
            found = _whole_contexts(storage, name, identity)
        except DamagedError as error:
            bad[name] = str(error)
        else:
            good, contexts = good + (found > 0), contexts + found
    return Verified(good, contexts, bad, strays(storage))


def _whole_contexts(storage: Storage, shard_id: str, identity: Identity) -> int:
    """The number of a shard's contexts, every byte checked; 0 where it was removed meanwhile."""
    try:
        with unless_removed(storage, shard_id):
            shard = Shard(storage, shard_id, identity)
            shard.verify()
            return shard.sidecar.contexts
        return 0
    finally:
        storage.release(shard_folder(shard_id))


def _is_named_by(place: str, identity: Identity) -> bool:
    name = place if "://" in place else str(Path(place).resolve())
    return name.rstrip("/").endswith(identity.digest[:12])


def drop_shards(place: str, shards: list[str]) -> None:
    """Remove shards that are not whole; the next `score` fills the gap.

    Each is checked once more. Running jobs keep no damaged shard: a binding that would need one is
    refused instead.
    """
    storage = open_storage(place)
    identity = read_identity(storage)
    with marked(storage, shards, "cache verify --repair"):
        for name in shards:
            try:
                _whole_contexts(storage, name, identity)
            except DamagedError:
                storage.remove(shard_folder(name), first=SIDECAR)


def verify_targets(path: Path, cache: str | None = None) -> Verified:
    """Check every byte that a targets.json needs; `cache` as in `TargetCache.open`.

    Raises:
        MissingFileError, StoreError: names the file that is not whole, and why.
    """
    targets = TargetCache.open(path, verify_all=True, cache=cache)
    return Verified(len(targets.binding.shards), len(targets.binding.keys.keys.unique()), {}, [])

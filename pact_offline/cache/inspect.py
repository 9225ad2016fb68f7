"""Listing stores, and checking every byte of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pact_offline.cache.bindings import usages
from pact_offline.cache.format import SIDECAR, is_committed, shard_folder, shard_ids
from pact_offline.cache.identity import IDENTITY_FILE, Identity, read_identity
from pact_offline.cache.shard import Shard
from pact_offline.cache.storage import join, open_storage
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.errors import DamagedError, MissingFileError, StoreError


def store_places(cache: str) -> list[str]:
    """The stores in a cache directory, or the store itself.

    Raises:
        MissingFileError: no such directory.
    """
    storage = open_storage(cache)
    if storage.has(IDENTITY_FILE):
        return [cache]
    if "://" not in cache and not Path(cache).is_dir():
        raise MissingFileError(f"{cache}: no such directory")
    return [join(cache, n) for n in storage.names() if storage.has(f"{n}/{IDENTITY_FILE}")]


def require_stores(cache: str) -> list[str]:
    """`store_places`, and at least one."""
    places = store_places(cache)
    if not places:
        raise MissingFileError(f"{cache}: expected a store or a directory of stores, found none")
    return places


def list_stores(cache: str) -> list[dict[str, Any]]:
    """Every store in a cache directory: name, counts, bytes, what made it and what uses it."""
    return [_describe(place) for place in store_places(cache)]


def _describe(place: str) -> dict[str, Any]:
    storage = open_storage(place)
    identity = read_identity(storage)
    sidecars = [Shard(storage, name, identity).sidecar for name in shard_ids(storage)]
    known = usages(storage).values()
    return {
        "name": place.rstrip("/").rsplit("/", 1)[-1],
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
    }


class Verified(NamedTuple):
    """What a check found: counts of what is whole, and shards that are not, with the reason."""

    shards: int
    contexts: int
    bad: dict[str, str]


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
            shard = Shard(storage, name, identity)
            shard.verify()
        except (StoreError, FileNotFoundError) as error:
            if not is_committed(storage, name):
                continue  # removed meanwhile
            if not isinstance(error, DamagedError):
                raise
            bad[name] = str(error)
        else:
            good, contexts = good + 1, contexts + shard.sidecar.contexts
        finally:
            storage.release(shard_folder(name))
    return Verified(good, contexts, bad)


def _is_named_by(place: str, identity: Identity) -> bool:
    name = place if "://" in place else str(Path(place).resolve())
    return name.rstrip("/").endswith(identity.digest[:12])


def drop_shards(place: str, shards: list[str]) -> None:
    """Remove shards that are not whole; the next `score` fills the gap.

    Running jobs keep no damaged shard: a binding that would need one is refused instead.
    """
    storage = open_storage(place)
    for name in shards:
        storage.remove(shard_folder(name), first=SIDECAR)


def verify_targets(path: Path) -> Verified:
    """Check every byte that a targets.json needs.

    Raises:
        MissingFileError, StoreError: names the file that is not whole, and why.
    """
    targets = TargetCache.open(path, verify_all=True)
    return Verified(len(targets.binding.shards), len(set(targets.binding.keys())), {})


def store_of(path: Path) -> str:
    """The store that a targets.json is bound to."""
    store = Binding.load(path).store
    return store if "://" in store else str(path.resolve().parent / store)

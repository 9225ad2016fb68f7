"""Listing stores, and checking every byte of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pact_offline.cache.reader import Store, TargetCache
from pact_offline.errors import MissingFileError, StoreError


def list_stores(cache: Path) -> list[dict[str, Any]]:
    """Every store in a cache directory: name, counts, bytes and what made it.

    Raises:
        MissingFileError: no such directory.
    """
    if not cache.is_dir():
        raise MissingFileError(f"{cache}: no such directory")
    found = []
    for identity in sorted(cache.glob("*/identity.json")):
        store = Store(identity.parent)
        found.append(
            {
                "name": identity.parent.name,
                "shards": len(store.sidecars),
                "contexts": sum(s.contexts for s in store.sidecars.values()),
                "steps": sum(s.steps for s in store.sidecars.values()),
                "bytes": sum(f.stat().st_size for f in identity.parent.rglob("*") if f.is_file()),
                "reference": store.identity.reference,
                "engine": store.identity.engine,
                "compute_dtype": store.identity.compute_dtype,
                "stored_dtype": store.identity.stored_dtype,
            }
        )
    return found


def verify(path: Path) -> tuple[int, int]:
    """Check a store (a directory) or all that a targets.json needs.

    Returns:
        the number of shards and of contexts that are whole.

    Raises:
        MissingFileError, StoreError: names what is not, and why.
    """
    if path.is_dir():
        if not (path / "identity.json").is_file():
            raise StoreError(f"{path}: expected a store with identity.json, found none")
        store = Store(path)
        for shard in store.sidecars:
            store.verify(shard)
        return len(store.sidecars), sum(s.contexts for s in store.sidecars.values())
    targets = TargetCache.open(path, verify_all=True)
    keys = {key for keys in targets.binding.examples for key in keys}
    return len(targets.binding.shards), len(keys)

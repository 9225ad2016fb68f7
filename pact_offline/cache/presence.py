"""Whether the targets that a targets.json names are still there."""

from __future__ import annotations

from pathlib import Path

from pact_offline.cache.format import IDENTITY_FILE, is_committed
from pact_offline.cache.storage import open_storage
from pact_offline.cache.targets import Binding, store_place
from pact_offline.errors import PactError


def is_there(targets: Path, cache: str) -> bool:
    """Whether every shard that a targets.json names is committed; no byte of one is checked.

    Args:
        targets: a targets.json; one that cannot be read names nothing that is there.
        cache: the cache, a directory or a URL; no other URL is asked.
    """
    try:
        binding = Binding.load(targets)
        storage = open_storage(store_place(binding.store, targets, cache))
        return storage.has(IDENTITY_FILE) and all(
            is_committed(storage, shard) for shard in binding.shards
        )
    except PactError:
        return False

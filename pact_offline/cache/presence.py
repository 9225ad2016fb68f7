"""Whether the targets that a targets.json names are still there, and of which rows they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pact_offline.cache.format import IDENTITY_FILE, is_committed
from pact_offline.cache.storage import open_storage
from pact_offline.cache.targets import Binding, store_place
from pact_offline.errors import PactError
from pact_offline.rows.files import checksum_of


def is_made_of(targets: Path, sources: Sequence[str]) -> bool:
    """Whether a targets.json is of these files as they are now; of the hub, of these names.

    Args:
        targets: a targets.json; one that cannot be read is of nothing.
        sources: of its rows; of rehearsed answers, the prompts.
    """
    try:
        binding = Binding.load(targets)
        asked = binding.provenance.get("rehearsal")
        bound = binding.rows if asked is None else asked["prompts"]
        return [row["source"] for row in bound] == [*sources] and all(
            row["sha256"] == checksum_of(source) for row, source in zip(bound, sources, strict=True)
        )
    except (PactError, OSError, KeyError, TypeError):
        return False


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

"""Which targets.json use a store: a record of each binding, kept in the store itself."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pact_offline.cache.format import BINDINGS, check_shard_id, is_committed, is_store
from pact_offline.cache.leases import marked_shards
from pact_offline.cache.row_keys import remove_keys
from pact_offline.cache.storage import Storage, join, open_storage
from pact_offline.cache.targets import Binding
from pact_offline.errors import DamagedError, MissingTargetError, PactError, StoreError
from pact_offline.files import parse_json

_RECORD = re.compile(r"[0-9a-f]{32}\.json")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Usage:
    """A targets.json that was bound to a store.

    Attributes:
        targets: its absolute path when it was written.
        machine: name of the machine it was written on.
        rows: how many rows it binds.
        shards: the shards it needs.
    """

    targets: str
    machine: str
    rows: int
    shards: tuple[str, ...]

    def is_missing(self) -> bool:
        """Whether its file is gone; None of our business on another machine."""
        return self.machine == platform.node() and not Path(self.targets).exists()


def _name_of(data: bytes) -> str:
    return f"{BINDINGS}/{hashlib.sha256(data).hexdigest()[:32]}.json"


def save_binding(place: str, binding: Binding, targets: Path) -> None:
    """Write a targets.json, and before it a record in its store that it needs these shards.

    The record of what it needed before goes last.

    Args:
        place: of the store.
        binding: whose shards are all there, as far as is known.
        targets: where to write it.

    Raises:
        MissingTargetError: a shard was removed meanwhile. Neither is written.
    """
    storage = open_storage(place)
    usage = Usage(
        str(targets.parent.resolve() / targets.name),
        platform.node(),
        len(binding.keys),
        tuple(binding.shards),
    )
    data = (json.dumps(asdict(usage), indent=1) + "\n").encode()
    record, replaced = _name_of(data), _same_targets(place, usage)
    is_new, is_saved = not storage.has(record), False
    if is_new:
        storage.write(record, data)
    try:
        _require_shards(storage, binding.shards)
        binding.save(targets)
        is_saved = True
        # A process that was suspended until here, as a laptop's may be, could have been taken for
        # dead, and its record for that of a file that is gone.
        _require_shards(storage, binding.shards)
        if not storage.has(record):
            raise _removed(storage, f"{targets}: its record")
    except PactError:
        if is_saved:
            targets.unlink(missing_ok=True)
            remove_keys(targets)
        if is_new:
            storage.remove_file(record)
        raise
    for store, name in replaced:
        if (store.url, name) != (storage.url, record):
            with suppress(StoreError):  # a store that cannot be written to keeps its shards anyway
                store.remove_file(name)


def _require_shards(storage: Storage, shards: Sequence[str]) -> None:
    """The second look: a removal marks before it looks at records, so it or this one sees."""
    marks = marked_shards(storage)
    for shard in shards:
        if shard in marks or not is_committed(storage, shard):
            raise _removed(storage, f"shard {shard}")


def _removed(storage: Storage, what: str) -> MissingTargetError:
    return MissingTargetError(
        f"{storage.url}: {what} was removed meanwhile, as by `pact-offline cache gc`; run "
        "`pact-offline score` again"
    )


def _same_targets(place: str, usage: Usage) -> list[tuple[Storage, str]]:
    """Records of what a targets.json needed until now, in every store of the cache."""
    found = []
    for store in _neighbours(place):
        with suppress(StoreError):  # another's damage is no reason not to bind
            for name, other in usages(store).items():
                if (other.targets, other.machine) == (usage.targets, usage.machine):
                    found.append((store, name))
    return found


def _neighbours(place: str) -> list[Storage]:
    """Every store of the cache that a store is in, itself among them."""
    parent, _, own = place.rstrip("/").rpartition("/")
    if "://" not in place:
        parent, own = str(Path(place).parent), Path(place).name
    cache = open_storage(parent)
    stores = [open_storage(place if n == own else join(parent, n)) for n in cache.names()]
    return [store for store in stores if is_store(store)]


def usages(storage: Storage) -> dict[str, Usage]:
    """Every record of a store by its name.

    Raises:
        StoreError: a record is damaged.
    """
    found = {}
    for entry in storage.names(BINDINGS):
        name = f"{BINDINGS}/{entry}"
        if not _RECORD.fullmatch(entry):
            continue  # one that another process is writing
        try:
            data = storage.read(name, _MAX_BYTES)
        except DamagedError:
            if storage.has(name):
                raise
            continue  # another process has just replaced it
        if _name_of(data) != name:
            raise StoreError(
                f"{storage.url}/{name}: expected the bytes that were written, found others; remove "
                "it, and run `pact-offline score` again for its targets.json"
            )
        value = parse_json(data, f"{storage.url}/{name}", StoreError)
        try:
            for shard in value["shards"]:
                check_shard_id(shard, f"{storage.url}/{name}: shards")
            found[name] = Usage(**{**value, "shards": tuple(value["shards"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{storage.url}/{name}: expected a binding, found: {error}") from None
    return found

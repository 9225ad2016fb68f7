"""Which targets.json use a store: a record of each binding, kept in the store itself."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pact_offline.cache.format import check_shard_id
from pact_offline.cache.identity import IDENTITY_FILE
from pact_offline.cache.storage import Storage, join, open_storage
from pact_offline.cache.targets import Binding
from pact_offline.errors import DamagedError, StoreError
from pact_offline.files import parse_json

_FOLDER = "bindings"
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
    return f"{_FOLDER}/{hashlib.sha256(data).hexdigest()[:32]}.json"


def record_usage(place: str, binding: Binding, targets: Path) -> None:
    """Remember that a targets.json needs some shards; replaces what it needed before."""
    storage = open_storage(place)
    usage = Usage(
        str(targets.parent.resolve() / targets.name),
        platform.node(),
        len(binding.examples),
        tuple(binding.shards),
    )
    data = (json.dumps(asdict(usage), indent=1) + "\n").encode()
    if not storage.has(_name_of(data)):
        storage.write(_name_of(data), data)
    for store in _neighbours(place):
        with suppress(StoreError):  # another's damage is no reason not to bind
            for name, other in usages(store).items():
                is_same = (other.targets, other.machine) == (usage.targets, usage.machine)
                if is_same and (other != usage or store.url != storage.url):
                    store.remove_file(name)


def _neighbours(place: str) -> list[Storage]:
    """Every store of the cache that a store is in, itself among them."""
    parent, _, own = place.rstrip("/").rpartition("/")
    if "://" not in place:
        parent, own = str(Path(place).parent), Path(place).name
    cache = open_storage(parent)
    names = [n for n in cache.names() if n == own or cache.has(f"{n}/{IDENTITY_FILE}")]
    return [open_storage(place if name == own else join(parent, name)) for name in names]


def usages(storage: Storage) -> dict[str, Usage]:
    """Every record of a store by its name.

    Raises:
        StoreError: a record is damaged.
    """
    found = {}
    for entry in storage.names(_FOLDER):
        name = f"{_FOLDER}/{entry}"
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

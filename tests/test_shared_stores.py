"""Jobs that score and bind, `cache gc`, `cache verify --repair` and readers, all on one store.

They run as threads that take turns at every call of the storage, in an order drawn by a seed.
"""

import itertools
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schedules import Schedule, TurnStorage
from stores import IDENTITY, context, fill, list_shards, named, values

from pact_offline.cache import leases, shard
from pact_offline.cache.bindings import save_binding, usages
from pact_offline.cache.format import join_pair
from pact_offline.cache.garbage import find_garbage, remove_garbage
from pact_offline.cache.inspect import drop_shards, verify_store
from pact_offline.cache.leases import users
from pact_offline.cache.storage import open_storage
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.models.locate import ModelFiles
from pact_offline.scoring.bind import bind
from pact_offline.scoring.dataset import Dataset
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings

EARLIER, UNBOUND, DAMAGED, NEW = (0, 1), (2,), (3,), (4, 5)
SETTINGS = ScoreSettings.model_validate({})
MODEL = ModelFiles("a/b", Path(), {"hub": "a/b", "commit": "c"})


class _NoThread:
    """A lease is younger than a schedule is long; nothing has to keep it fresh."""

    def __init__(self, **_: Any) -> None: ...
    def start(self) -> None: ...
    def join(self) -> None: ...


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def remembered(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zarr and Arrow make of the same bytes is made once, not ten thousand times."""
    kept = disk / "kept"
    written: dict[str, str] = {}
    tables: dict[str, shard.Contexts] = {}
    checked: dict[tuple[Any, ...], bytes] = {}
    write_shard, contexts, check_array = (
        shard.write_shard, shard.Shard.contexts, shard._check_array
    )  # fmt: skip

    def write_once(folder: Path, keys: list[str], *args: Any, **kwargs: Any) -> str:
        name = "-".join([*keys, str(kwargs["provenance"].get("instead_of"))])
        if name not in written:
            written[name] = write_shard(folder, keys, *args, **kwargs)
            shutil.copytree(folder, kept / written[name])
        else:
            shutil.copytree(kept / written[name], folder, copy_function=os.link, dirs_exist_ok=True)
        return written[name]

    def contexts_once(self: shard.Shard) -> shard.Contexts:
        if self.id not in tables:
            tables[self.id] = contexts(self)
        else:
            self._verified("contexts.arrow")  # the id stands for its bytes
        return tables[self.id]

    def check_once(folder: Path, *args: Any) -> None:
        data = (folder / "zarr.json").read_bytes()
        if checked.get(args[:2]) != data:
            check_array(folder, *args)
            checked[args[:2]] = data

    monkeypatch.setattr("pact_offline.cache.writer.write_shard", write_once)
    monkeypatch.setattr(shard.Shard, "contexts", contexts_once)
    monkeypatch.setattr(shard, "_check_array", check_once)


@pytest.fixture
def turns(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps a lease fresh or sleeps but by the schedule; turns:// is a `TurnStorage`."""
    TurnStorage.scratch = disk / "scratch"
    TurnStorage.scratch.mkdir()
    monkeypatch.setattr("pact_offline.cache.storage.RemoteStorage", TurnStorage)
    monkeypatch.setattr(leases, "Thread", _NoThread)
    monkeypatch.setattr(leases, "sleep", lambda seconds: TurnStorage.turns.wait(seconds))
    monkeypatch.setattr("pact_offline.files.to_disk", lambda path: None)
    monkeypatch.setattr("pact_offline.scoring.bind.provenance", lambda **facts: facts)
    monkeypatch.setattr("pact_offline.scoring.job.log.disabled", True)


def dataset(store: str, numbers: tuple[int, ...]) -> Dataset:
    contexts = {context(number).key: context(number) for number in numbers}
    return Dataset(
        examples=tuple(join_pair(key, key) for key in contexts),
        sources=({"source": "rows.jsonl", "rows": len(numbers)},),
        tokenizer="",
        identity=IDENTITY,
        store=store,
        backend="test",
        backend_reason="",
        read_contexts=lambda: contexts,
    )


def score(store: str, numbers: tuple[int, ...], targets: Path) -> None:
    """What `pact-offline score` does, with values that are known."""
    named_by = {context(number).key: number for number in numbers}
    with ScoringJob(dataset(store, numbers)) as job:
        if missing := job.missing():
            with StoreWriter(store, IDENTITY, 1000, {"by": "test"}) as writer:
                job.lease.take()
                for key in missing:
                    writer.add(job.dataset.contexts[key], values(named_by[key]))
            job.add(writer.shards)
        bind(job, MODEL, SETTINGS, targets)


def collect(store: str, forget_missing: bool) -> None:
    storage = open_storage(store)
    if not users(storage):
        garbage = find_garbage(storage, forget_missing=forget_missing, older_than=0)
        remove_garbage(storage, garbage)


def repair(store: str) -> None:
    drop_shards(store, list(verify_store(store).bad))


def draw_operations(
    store: str, folder: Path, draw: random.Random
) -> tuple[dict[str, Callable[[], None]], dict[Path, tuple[int, ...]]]:
    """What may go on at once, by name; and the contexts of each targets.json that is written."""
    written = {}
    for name in ("one", "two"):
        some = draw.sample((*EARLIER, *UNBOUND, *DAMAGED, *NEW), draw.randint(1, 4))
        written[folder / f"{name}.json"] = tuple(some)
    (one, two), forget = written.items(), draw.random() < 0.5
    return {
        "job": lambda: score(store, one[1], one[0]),
        "another job": lambda: score(store, two[1], two[0]),
        "gc": lambda: collect(store, forget),
        "another gc": lambda: collect(store, forget),
        "verify --repair": lambda: repair(store),
        "reader": lambda: read_all(folder / "earlier.json", EARLIER),
    }, written


def read_all(targets: Path, numbers: tuple[int, ...]) -> None:
    cache = TargetCache.open(targets)
    for index, number in enumerate(numbers):
        for found in cache[index]:
            np.testing.assert_allclose(found, values(number), rtol=1e-3)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store with a shard that is bound, one that is not, and half of one."""
    folder = tmp_path_factory.mktemp("template")
    store = named(folder)
    for numbers in (EARLIER, UNBOUND, DAMAGED):
        known = set(list_shards(store)) if store.exists() else set()
        fill(store, range(numbers[0], numbers[-1] + 1))
        (made,) = set(list_shards(store)) - known
        if numbers == EARLIER:
            rows = dataset(str(store), EARLIER)
            binding = Binding(str(store), IDENTITY, "", 9, rows.examples, (made,), rows.sources, {})
            save_binding(str(store), binding, folder / "earlier.json")
        elif numbers == DAMAGED:
            (store / "shards" / made / "log_confidence.zarr" / "c" / "0" / "0").unlink()
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_ten_thousand_random_schedules_lose_nothing(
    disk: Path,
    template: dict[str, bytes],
    remembered: None,
    turns: None,
    fact: Callable[[str], None],
) -> None:
    """Every pair of operations, interleaved at every call of the storage; some with all at once."""
    store = named(Path("cache")).as_posix()
    earlier = disk / "earlier.json"
    earlier.write_bytes(
        template["earlier.json"].replace(named(Path()).name.encode(), f"turns://{store}".encode())
    )
    files = {f"cache/{name}": data for name, data in template.items()}
    pairs: Counter[frozenset[str]] = Counter()
    steps = bound = 0
    for seed in range(int(os.environ.get("N", "100"))):
        turns = Schedule(seed)
        TurnStorage.restart(files, turns, is_disk=seed % 2 == 0)
        operations, written = draw_operations(f"turns://{store}", disk, turns.draw)
        written[earlier] = EARLIER
        chosen = turns.draw.sample(list(operations), turns.draw.choice([2, 2, 3, 6]))
        pairs.update(map(frozenset, itertools.combinations(chosen, 2)))
        turns.run([operations[name] for name in chosen])
        targets = [path for path in written if path.exists()]
        for path in targets:
            read_all(path, written[path])
        storage = open_storage(f"turns://{store}")
        assert len(usages(storage)) == len(targets) == 1 + len({"job", "another job"} & {*chosen})
        assert [storage.names(name) for name in ("leases", "removals")] == [[], []]
        steps, bound = steps + turns.steps, bound + len(targets)
        for path in targets[:-1]:
            path.unlink()
    assert len(pairs) == 15
    fact(
        f"10,000 random schedules of jobs, gc, verify --repair and readers on one store, {steps} "
        f"steps, each pair at least {min(pairs.values())} times: {bound} bindings whole, 0 lost"
    )

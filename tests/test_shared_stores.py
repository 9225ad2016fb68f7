"""Jobs that score and bind, `cache gc`, `cache verify --repair` and readers, all on one store.

They run as threads that take turns at every call of the storage, in an order drawn by a seed.
"""

import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result
from schedules import Schedule, TurnStorage
from stores import (
    IDENTITY,
    binding,
    commit_together,
    context,
    fill,
    labels,
    list_shards,
    named,
    tokenized,
    values,
)

from pact_offline.cache import leases, shard
from pact_offline.cache.bindings import save_binding, usages
from pact_offline.cache.garbage import find_garbage, remove_garbage
from pact_offline.cache.inspect import drop_shards, verify_store
from pact_offline.cache.leases import Lease, users
from pact_offline.cache.shard import Shard
from pact_offline.cache.storage import LocalStorage, open_storage
from pact_offline.cache.store import Store
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import MissingTargetError, PactError, StoreError
from pact_offline.models.locate import ModelFiles
from pact_offline.scoring.bind import bind
from pact_offline.scoring.dataset import Dataset
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings

EARLIER, UNBOUND, DAMAGED, NEW = (0, 1), (2,), (3,), (4, 5)
SETTINGS = ScoreSettings.model_validate({})
MODEL = ModelFiles("a/b", Path(), {"hub": "a/b", "commit": "c"})


NUMBERS = (*EARLIER, *UNBOUND, *DAMAGED, *NEW)
RIGHT = {number: values(number) for number in NUMBERS}
OWN = {number: labels(number) for number in NUMBERS}


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


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What zarr and Arrow make of the same bytes is made once, not ten thousand times."""
    written: dict[str, tuple[str, dict[str, bytes]]] = {}
    tables: dict[str, shard.Contexts] = {}
    checked: dict[tuple[Any, ...], bytes] = {}
    shard_files, contexts, check_array = (
        shard.shard_files, shard.Shard.contexts, shard._check_array
    )  # fmt: skip

    def make_once(keys: list[str], *args: Any, **kwargs: Any) -> tuple[str, dict[str, bytes]]:
        name = "-".join([*keys, str(kwargs["provenance"].get("instead_of"))])
        if name not in written:
            written[name] = shard_files(keys, *args, **kwargs)
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

    monkeypatch.setattr("pact_offline.cache.writer.shard_files", make_once)
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
    return Dataset(tokenized(numbers), IDENTITY, store, backend="test", backend_reason="")


def score(store: str, numbers: tuple[int, ...], targets: Path) -> None:
    """What `pact-offline score` does, with values that are known."""
    named_by = {context(number).key: number for number in numbers}
    with ScoringJob(dataset(store, numbers)) as job:
        if len(missing := job.missing()):
            with StoreWriter(store, IDENTITY, 1000, {"by": "test"}) as writer:
                job.lease.take()
                for one in job.dataset.contexts(job.dataset.distinct[missing]):
                    writer.add(one, RIGHT[named_by[one.key]], OWN[named_by[one.key]])
            job.add(writer.shards)
        bind(job, MODEL, SETTINGS, targets)


def collect(store: str, forget_missing: bool) -> None:
    storage = open_storage(store)
    if not users(storage):
        garbage = find_garbage(storage, forget_missing=forget_missing, older_than=0)
        remove_garbage(storage, garbage)


def repair(store: str) -> None:
    drop_shards(store, list(verify_store(store).bad))


class Cache(NamedTuple):
    """A store, its files at the start, and the targets.json that is bound to it then."""

    store: str
    files: dict[str, bytes]
    earlier: Path


def draw_operations(
    cache: Cache, draw: random.Random, *, forgets: bool = True
) -> tuple[dict[str, Callable[[], None]], dict[Path, tuple[int, ...]]]:
    """What may go on at once, by name; and the contexts of each targets.json that is written."""
    store, written = cache.store, {}
    for name in ("one", "two"):
        some = draw.sample(NUMBERS, draw.randint(1, 4))
        written[cache.earlier.with_name(f"{name}.json")] = tuple(some)
    (one, two), forget = written.items(), forgets and draw.random() < 0.5
    written[cache.earlier] = EARLIER
    return {
        "job": lambda: score(store, one[1], one[0]),
        "another job": lambda: score(store, two[1], two[0]),
        "gc": lambda: collect(store, forget),
        "another gc": lambda: collect(store, forget),
        "verify --repair": lambda: repair(store),
        "reader": lambda: read_all(cache.earlier, EARLIER),
    }, written


def read_all(targets: Path, numbers: tuple[int, ...]) -> None:
    cache = TargetCache.open(targets, cache="turns://cache")
    for index, number in enumerate(numbers):
        for found in cache[index]:
            assert np.abs(found - RIGHT[number]).max() < 0.02
        assert np.abs(cache.read_labels([index]) - OWN[number]).max() < 0.02


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
            save_binding(str(store), binding(store, EARLIER, [made]), folder / "earlier.json")
        elif numbers == DAMAGED:
            (store / "shards" / made / "log_confidence.zarr" / "c" / "0" / "0").unlink()
    return files_in(folder)


@pytest.fixture
def cache(disk: Path, template: dict[str, bytes], remembered: None, turns: None) -> Cache:
    """The template at turns://, and a targets.json that was bound to it earlier."""
    store, earlier = named(Path("cache")).as_posix(), disk / "earlier.json"
    place = f"turns://{store}"
    earlier.write_bytes(template["earlier.json"].replace(Path(store).name.encode(), place.encode()))
    (keys,) = (name for name in template if name.startswith("earlier-"))
    (disk / keys).write_bytes(template[keys])
    return Cache(place, {f"cache/{name}": data for name, data in template.items()}, earlier)


def test_ten_thousand_random_schedules_lose_nothing(
    cache: Cache, fact: Callable[[str], None]
) -> None:
    """Every pair of operations, interleaved at every call of the storage; some with all at once."""
    pairs: Counter[frozenset[str]] = Counter()
    steps = bound = 0
    for seed in range(10_000):
        turns = Schedule(seed)
        TurnStorage.restart(cache.files, turns, is_disk=seed % 2 == 0)
        operations, written = draw_operations(cache, turns.draw)
        chosen = turns.draw.sample(list(operations), turns.draw.choice([2] * 9 + [6]))
        pairs.update(map(frozenset, itertools.combinations(chosen, 2)))
        turns.run([operations[name] for name in chosen])
        targets = [path for path in written if path.exists()]
        for path in targets:
            read_all(path, written[path])
            if path != cache.earlier:
                path.unlink()
        storage = open_storage(cache.store)
        assert len(usages(storage)) == len(targets) == 1 + len({"job", "another job"} & {*chosen})
        assert [storage.names(name) for name in ("leases", "removals")] == [[], []]
        steps, bound = steps + turns.steps, bound + len(targets)
    assert len(pairs) == 15
    fact(
        f"10,000 random schedules of jobs, gc, verify --repair and readers on one store, {steps} "
        f"steps, each pair at least {min(pairs.values())} times: {bound} bindings whole, 0 lost"
    )


def test_suspended_and_killed_processes_break_no_binding(
    cache: Cache, fact: Callable[[str], None]
) -> None:
    """Leases and marks grow old between any two steps, and processes end at any."""
    counts: Counter[str] = Counter()
    for seed in range(400):
        turns = Schedule(seed, seconds=(seed % 5 + 1) * 60, kills=seed % 3 * 0.2)
        TurnStorage.restart(cache.files, turns, is_disk=seed % 2 == 0)
        operations, written = draw_operations(cache, turns.draw, forgets=not seed % 3)

        def ended(name: str, operation: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                try:
                    operation()
                except PactError as error:
                    assert name != "reader"
                    assert "\n" not in str(error)
                    counts["one line"] += 1

            return run

        turns.run([ended(*item) for item in operations.items()])
        targets = [path for path in written if path.exists()]
        for path in targets:
            read_all(path, written[path])
        counts["whole"] += len(targets)
        # The same commands again, and nothing is left of those that were killed.
        turns.steps += 10**6
        for name in ("job", "another job", "gc"):
            operations[name]()
        for path in written:
            read_all(path, written[path])
            if path != cache.earlier:
                path.unlink()
        storage = open_storage(cache.store)
        assert storage.names("leases") == []
    assert counts["one line"] > 50
    fact(
        f"400 schedules with processes that are suspended past their leases, or killed: "
        f"{counts['one line']} ended with one line, {counts['whole']} bindings whole, 0 broken"
    )


def test_two_writers_of_the_same_shard_both_succeed(tmp_path: Path) -> None:
    store = named(tmp_path)
    writers = [StoreWriter(store, IDENTITY, 1000, {"made_at": "now"}) for _ in range(2)]
    for writer in writers:
        for number in range(5):
            writer.add(context(number), values(number), labels(number))
        writer.commit()
    assert writers[0].shards == writers[1].shards == list_shards(store)
    assert list((store / "open").iterdir()) == []
    assert verify_store(str(store))[:2] == (1, 5)


@pytest.mark.parametrize("what", ["damaged", "without a sidecar"])
def test_what_lies_under_a_shards_id_counts_only_if_it_is_whole(what: str, tmp_path: Path) -> None:
    store = named(tmp_path)
    fill(store, range(5))
    (taken,) = list_shards(store)
    folder = store / "shards" / taken
    if what == "damaged":
        (folder / "log_confidence.zarr" / "c" / "0" / "0").write_bytes(b"x")
    else:
        (folder / "shard.json").unlink()
    (made,) = fill(store, range(5)).shards
    assert made != taken
    Shard(open_storage(store), made, IDENTITY).verify()
    assert json.loads((store / "shards" / made / "shard.json").read_text())["provenance"] == {
        "by": "test",
        "instead_of": taken,
    }


def test_two_jobs_that_score_the_same_rows_both_succeed(tmp_path: Path) -> None:
    """Processes of their own, which come to the rename in the same moment, time after time."""
    work = multiprocessing.get_context("forkserver")
    store, jobs = named(tmp_path), 2
    gate = work.Barrier(jobs)
    started = [work.Process(target=commit_together, args=(store, gate, 10)) for _ in range(jobs)]
    for one in started:
        one.start()
    for one in started:
        one.join()
        assert one.exitcode == 0
    assert verify_store(str(store))[:2] == (10, 10)


def test_gc_leaves_a_store_alone_that_a_job_works_on_however_long(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    store = named(tmp_path)
    gc = ["cache", "gc", tmp_path, "--older-than", 0, "--yes"]
    with ScoringJob(dataset(str(store), (1, 2))) as job:
        writer = fill(store, range(1, 3))
        job.lease.take()
        for path in (store / "shards").rglob("*"):
            os.utime(path, (1, 1))
        said = run(*gc).stdout
        assert f"in use by score rows.jsonl on {platform.node()} since 20" in said
        assert list_shards(store) == writer.shards
    said = run(*gc).stdout  # given back, and nothing was bound
    assert "1 unused shards" in said
    assert list_shards(store) == []


def test_the_lease_of_a_part_stands_until_its_dataset_is_bound(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    store, rows = named(tmp_path), dataset(str(named(tmp_path)), (1, 2))
    gc = ["cache", "gc", tmp_path, "--older-than", 0, "--yes"]
    for part in ((1, 2), (2, 2)):
        with ScoringJob(rows, part) as job:
            fill(store, range(part[0], part[0] + 1))
            job.lease.take()
        for path in (store / "leases").iterdir():
            os.utime(path, (time.time() - 24 * 3600,) * 2)
    assert "--part 2/2" in run(*gc).stdout
    with ScoringJob(rows) as job:
        bind(job, MODEL, SETTINGS, tmp_path / "targets.json")
    assert list((store / "leases").iterdir()) == []
    assert "nothing to remove" in run(*gc).stdout
    read_all(tmp_path / "targets.json", (1, 2))


def test_the_lease_of_a_killed_job_grows_old(tmp_path: Path, run: Callable[..., Result]) -> None:
    store = named(tmp_path)
    gc = ["cache", "gc", tmp_path, "--older-than", 0, "--yes"]
    fill(store, range(3))
    Lease(open_storage(store), "0" * 32, "score").take()
    (lease,) = (store / "leases").iterdir()
    assert "in use by score" in run(*gc).stdout
    os.utime(lease, (time.time() - 3700,) * 2)
    assert "1 unused shards, 1 leftovers" in run(*gc).stdout
    assert list_shards(store) == list((store / "leases").iterdir()) == []


def test_a_lease_is_kept_fresh_through_faults_and_keeps_no_process_alive(tmp_path: Path) -> None:
    """A process that takes a lease and ends without giving it back; its storage fails at times."""
    code = f"""
import sys, time
from pact_offline.cache import leases
from pact_offline.cache.storage import open_storage
from pact_offline.errors import StoreError
leases._JOB_LIFE = 0.2
storage = open_storage({str(tmp_path)!r})
written, write = [], storage.write
def flaky(name, data):
    written.append(name)
    if len(written) % 2:
        raise StoreError("busy")
    write(name, data)
lease = leases.Lease(storage, "0" * 32, "score")
lease.take()
storage.write = flaky
while len(written) < 9:
    time.sleep(0.01)
assert leases.users(storage)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "leases").glob("*.json"))) == 1


def test_a_store_that_cannot_be_written_to_is_still_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To where it was bound before: a new record has to be written."""
    store, targets = named(tmp_path), tmp_path / "targets.json"
    score(str(store), (1, 2), targets)
    targets.unlink()

    def refuse(self: LocalStorage, name: str, data: bytes) -> None:
        raise StoreError(f"{self.url}/{name}: cannot be used: Read-only file system")

    monkeypatch.setattr(LocalStorage, "write", refuse)
    score(str(store), (1, 2), targets)
    read_all(targets, (1, 2))
    assert "Read-only file system; without a lease" in caplog.text


def test_a_binding_of_what_gc_is_removing_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job whose lease has grown old: between gc's look and its removal, it binds."""
    store, targets = named(tmp_path), tmp_path / "targets.json"
    fill(store, range(2))
    storage = open_storage(store)
    garbage = find_garbage(storage, forget_missing=False, older_than=0)
    job = ScoringJob(dataset(str(store), (0, 1)))
    job.store = Store(store)
    waits, removed, remove = Event(), Event(), LocalStorage.remove
    found: list[PactError] = []

    def wait(seconds: float) -> None:
        waits.set()
        removed.wait(10)

    def binding() -> None:
        try:
            bind(job, MODEL, SETTINGS, targets)
        except PactError as error:
            found.append(error)

    def remove_late(self: LocalStorage, name: str, first: str) -> None:
        binder.start()
        assert waits.wait(10)  # it has recorded its binding, and sees the mark
        remove(self, name, first)
        removed.set()

    binder = Thread(target=binding)
    monkeypatch.setattr(leases, "sleep", wait)
    monkeypatch.setattr(LocalStorage, "remove", remove_late)
    assert len(remove_garbage(storage, garbage).shards) == 1
    binder.join()
    assert "removed meanwhile" in str(found[0])
    assert not targets.exists()
    assert list((store / "bindings").iterdir()) == []


def test_a_binding_that_fails_leaves_the_one_before_it(tmp_path: Path) -> None:
    store, targets = named(tmp_path), tmp_path / "targets.json"
    score(str(store), (1, 2), targets)
    records = list((store / "bindings").iterdir())
    with ScoringJob(dataset(str(store), (3,))) as job:
        job.add(fill(store, range(3, 4)).shards)
        shutil.rmtree(store / "shards" / job.store.shards[-1].id)
        with pytest.raises(MissingTargetError, match="removed meanwhile"):
            bind(job, MODEL, SETTINGS, targets)
    read_all(targets, (1, 2))
    assert list((store / "bindings").iterdir()) == records


def test_a_binding_whose_shard_goes_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, save = named(tmp_path), Binding.save

    def save_late(self: Binding, path: Path) -> None:
        save(self, path)
        assert {one.suffix for one in tmp_path.glob("targets*")} == {".json", ".arrow"}
        shutil.rmtree(store / "shards" / self.shards[0])

    monkeypatch.setattr(Binding, "save", save_late)
    with pytest.raises(MissingTargetError, match="removed meanwhile"):
        score(str(store), (1, 2), tmp_path / "targets.json")
    assert list(tmp_path.glob("targets*")) == []
    assert list((store / "bindings").iterdir()) == []


def test_a_store_is_opened_once_in_a_scoring_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hashed = named(tmp_path), []
    fill(store, range(3))
    contexts = Shard.contexts
    monkeypatch.setattr(Shard, "contexts", lambda self: hashed.append(self.id) or contexts(self))
    score(str(store), (1, 2, 5), tmp_path / "targets.json")
    assert sorted(hashed) == list_shards(store)


@pytest.mark.parametrize("folder", ["leases", "removals"])
def test_a_damaged_lease_or_mark_is_one_line(
    folder: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    store = named(tmp_path)
    fill(store, range(3))
    (store / folder).mkdir()
    (store / folder / f"{'0' * 32}.json").write_text("[" * 9)
    (store / folder / ".half.json.1234.tmp").write_text("{")
    line = fails("cache", "gc", store, "--older-than", 0, "--yes")
    assert f"{folder}/{'0' * 32}.json: expected what a running job writes" in line
    assert len(list_shards(store)) == 1

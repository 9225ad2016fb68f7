"""Small stores made on the spot, and the writers that faults are done to.

Light on imports, since a process is started for each of a hundred writers.
"""

import functools
import gc
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # before a writer becomes a user who may not read it
import pyarrow as pa

from pact_offline.arrow import array_of, lists_of
from pact_offline.cache.bindings import save_binding
from pact_offline.cache.format import shard_ids
from pact_offline.cache.identity import Identity
from pact_offline.cache.inspect import verify_store
from pact_offline.cache.row_keys import RowKeys
from pact_offline.cache.storage import open_storage
from pact_offline.cache.store import Store
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import StoreError
from pact_offline.rows.contexts import Context, TokenizedExample, full_context
from pact_offline.rows.spans import Turn
from pact_offline.rows.tokenized import TokenizedRows
from pact_offline.rows.tokenizing import SCHEMA, Facts

CONTEXTS = 60
IDENTITY = Identity(
    {"hub": "a/b", "commit": "c"}, (3, 5, 8), (1, 2), "test 1", "float32", "float16"
)


def example(number: int, steps: int = 4) -> TokenizedExample:
    ids = np.arange(number, number + 10 + steps, dtype=np.int32)
    return TokenizedExample(ids, (Turn(10, 10, 10, 10 + steps),))


def context(number: int, steps: int = 4) -> Context:
    return full_context(example(number, steps))


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    """A row of what a user says and what is answered, time after time."""
    pairs = (pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=True))
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def list_shards(store: Path) -> list[str]:
    return shard_ids(open_storage(store))


def places_of(store: Store, *numbers: int) -> np.ndarray:
    places = store.locate([context(number).key for number in numbers])
    assert (places >= 0).all()
    return places


def read(store: Store, *numbers: int) -> np.ndarray:
    return store.read(places_of(store, *numbers))


def values(number: int, steps: int = 4) -> np.ndarray:
    return -np.random.default_rng(number).random((steps, 3), dtype=np.float32) * 20


def labels(number: int, steps: int = 4) -> np.ndarray:
    return -np.random.default_rng(10**6 + number).random(steps, dtype=np.float32) * 20


def named(folder: Path) -> Path:
    """A store's directory ends with its identity."""
    return folder / f"store-{IDENTITY.digest[:12]}"


def whole(store: Path) -> tuple[int, int]:
    found = verify_store(str(store))
    assert not found.bad
    return found.shards, found.contexts


def fill(store: Path, numbers: range, shard_steps: int = 1000) -> StoreWriter:
    with StoreWriter(store, IDENTITY, shard_steps, {"by": "test"}) as writer:
        for number in numbers:
            writer.add(context(number), values(number), labels(number))
    return writer


def write_missing(store: Path, seed: int, pause: float) -> None:
    """A writer as `score` is one: asks what is there, adds the rest in an order of its own."""
    numbers = list(range(CONTEXTS))
    random.Random(seed).shuffle(numbers)
    if (store / "identity.json").exists():
        opened = Store(store)
        places = opened.locate([context(number).key for number in numbers])
        numbers = [n for n, place in zip(numbers, places, strict=True) if place < 0]
    with StoreWriter(store, IDENTITY, 12, {"seed": seed}) as writer:
        for number in numbers:
            writer.add(context(number), values(number), labels(number))
            time.sleep(pause)


def commit_together(store: Path, gate: Any, count: int) -> None:
    """Commit shards at the same moments as others do that hold the same."""
    writer = StoreWriter(store, IDENTITY, 10**6, {"by": "test"})
    for number in range(count):
        writer.add(context(number), values(number), labels(number))
        gate.wait(60)
        writer.commit()


def holds_all(store: Path, numbers: range) -> None:
    """Every context is there once in a binding, and as it was written."""
    opened = Store(store)
    places = opened.locate([context(number).key for number in numbers])
    assert (places >= 0).all()
    assert len(set(places.tolist())) == len(places)
    for number, place in zip(numbers, places, strict=True):
        np.testing.assert_allclose(opened.read([place]), values(number), rtol=1e-3)
        np.testing.assert_allclose(opened.read_labels([place]), labels(number), rtol=1e-3)


def row_keys(numbers: Iterable[int]) -> RowKeys:
    """Of rows whose two contexts are one and the same."""
    return RowKeys.of([[context(number).key] * 2 for number in numbers])


def binding(store: str | Path, numbers: Iterable[int], shards: Sequence[str]) -> Binding:
    keys = row_keys(numbers)
    return Binding(str(store), IDENTITY, "", "", {}, keys, tuple(shards), ({},), {})


def bind(store: Path, targets: Path, numbers: range) -> None:
    opened = Store(store)
    shards = opened.shards_of(places_of(opened, *numbers))
    save_binding(str(store), binding(store, numbers, shards), targets)


@functools.cache
def tokenized(numbers: tuple[int, ...]) -> TokenizedRows:
    """Rows of a file as `row_keys` has them."""
    examples = [example(number) for number in numbers]
    ids = np.concatenate([one.ids for one in examples])
    turns = np.array([one.turns for one in examples], dtype=np.int32).reshape(-1)
    columns = [
        lists_of(np.cumsum([len(one.ids) for one in examples]), array_of(ids)),
        lists_of(4 * np.arange(1, len(numbers) + 1), array_of(turns)),
        pa.array([full_context(one).key_bytes * 2 for one in examples], pa.large_binary()),
        array_of(np.arange(1, len(numbers) + 1)),
        array_of(np.zeros(len(numbers), np.uint8)),
    ]
    facts = Facts("rows.jsonl", "", "", [*IDENTITY.header_ids], read=len(numbers))
    return TokenizedRows([facts], [pa.table(columns, schema=SCHEMA)], [])


def kill_writers(place: str, count: str) -> None:
    """Fork writers and kill each at a random point; print what came of it as JSON."""
    store, draw = Path(place), random.Random(1)
    killed = midway = filled = 0
    fill(store.with_name("warm-up"), range(1))  # what the first shard alone has to load
    started = time.monotonic()
    write_missing(store.with_name("whole"), 0, 0.0002)
    whole_run = time.monotonic() - started  # of this machine, as busy as it is
    while killed < int(count):
        before = len(Store(store)) if (store / "identity.json").exists() else 0
        child = os.fork()
        if not child:
            write_missing(store, killed, 0.0002)
            os._exit(0)
        time.sleep(draw.uniform(0.0, whole_run))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not (store / "identity.json").exists():
            continue
        after = whole(store)[1]
        assert after >= before
        midway += before < after < CONTEXTS
        if after == CONTEXTS:
            holds_all(store, range(CONTEXTS))
            shutil.rmtree(store)
            filled += 1
    write_missing(store, 0, 0)
    holds_all(store, range(CONTEXTS))
    print(json.dumps({"killed": killed, "midway": midway, "filled": filled + 1}))


def refused(work: Callable[[], None]) -> int:
    """Exit code 2 where `work` ends with one `StoreError` of one line."""
    try:
        work()
    except StoreError as error:
        return 2 if "\n" not in str(error) else 3
    return 0


def write_with_small_files(store: Path, limit: int) -> None:
    """Add contexts where the system refuses to write more than `limit` bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(refused(lambda: fill_from(store, 20)))


def write_as_nobody(store: Path) -> None:
    fill(store.with_name("warm-up"), range(1))  # imports what nobody may not read
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65534)
    sys.exit(refused(lambda: fill_from(store, 20)))


def fill_from(store: Path, first: int) -> None:
    fill(store, range(first, first + 20), shard_steps=20)


def read_as_worker(
    targets: TargetCache, right: list[np.ndarray], scratch: str, env: dict[str, str]
) -> None:
    """Read all that `targets` has, as a data-loader's worker does, and end a copy of it."""
    os.environ.update(env)
    tempfile.tempdir = scratch
    pickle.loads(pickle.dumps(targets))[len(right) - 1]  # noqa: S301
    gc.collect()
    for index, expected in enumerate(right):
        np.testing.assert_array_equal(targets[index].full, expected)
        own = labels(index).astype(np.float16)
        np.testing.assert_array_equal(targets.read_labels([index]), own)

"""Faults, made on purpose: flipped bytes, killed writers, many writers, full and read-only places.

What was done, and how often, is printed at the end of the test run.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import write_rows
from stores import (
    CONTEXTS,
    bind,
    fill,
    fill_from,
    holds_all,
    named,
    whole,
    write_as_nobody,
    write_missing,
    write_with_small_files,
)

from pact_offline.cache.format import shard_ids
from pact_offline.cache.inspect import verify_store, verify_targets
from pact_offline.cache.storage import open_storage
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import PactError, StoreError


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[..., Any]]:
    """Start a function in a process of its own, from a server that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stores"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server knows no sys.path

        def start(function: Callable[..., None], *args: Any) -> Any:
            started = context.Process(target=function, args=args)
            started.start()
            return started

        yield start


def test_a_thousand_flipped_bytes_are_found(tmp_path: Path, fact: Callable[[str], None]) -> None:
    """Anywhere in a store, or in the rows' keys, by `cache verify`; and none is used."""
    store, targets, numbers = named(tmp_path), tmp_path / "targets.json", range(12)
    fill(store, numbers, shard_steps=16)
    bind(store, targets, numbers)
    whole_one = TargetCache.open(targets)
    right = [(whole_one[index].full, whole_one.read_labels([index])) for index in numbers]
    (keys,) = tmp_path.glob("targets-*.arrow")
    files = [path for path in sorted([*store.rglob("*"), keys]) if path.is_file()]
    flipped = {path.name: 0 for path in files}
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(0)
    found_by = {"verify": 0, "opening or reading": 0, "not read": 0}
    for _ in range(1000):
        file = draw.choices(files, sizes)[0]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= draw.randrange(1, 256)
        file.write_bytes(bad)
        flipped[file.name] += 1
        with contextlib.suppress(StoreError):
            verified = verify_targets(targets) if file == keys else verify_store(str(store))
            assert verified.bad, f"{file}: not found"
        found_by["verify"] += 1
        try:
            opened = TargetCache.open(targets)
            for index in numbers:
                np.testing.assert_array_equal(opened[index].full, right[index][0])
                np.testing.assert_array_equal(opened.read_labels([index]), right[index][1])
            found_by["not read"] += 1
        except PactError:
            found_by["opening or reading"] += 1
        file.write_bytes(good)
    assert found_by["verify"] == 1000
    assert min(flipped.values()) > 0
    assert found_by["opening or reading"] > 800
    assert whole(store)[1] == len(numbers)
    fact(
        f"1000 flipped bytes: {found_by['verify']} found by verify; of what is read of a store "
        f"{found_by['opening or reading']} refused, {found_by['not read']} in files that nobody "
        "reads, 0 used"
    )


def test_a_hundred_killed_writers_lose_no_committed_shard(
    tmp_path: Path, fact: Callable[[str], None]
) -> None:
    code = "import stores, sys; stores.kill_writers(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(named(tmp_path)), "100"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] == 100
    assert counts["midway"] > 30
    fact(
        f"{counts['killed']} writers killed at random points, {counts['midway']} of them between "
        f"the commits of two shards: 0 shards damaged or lost, {counts['filled']} stores filled by "
        "those that came after"
    )


@pytest.mark.parametrize("writers", [2, 4])
def test_writers_at_once_fill_one_store(
    writers: int, tmp_path: Path, fact: Callable[[str], None], process: Callable[..., Any]
) -> None:
    store = named(tmp_path)
    started = [process(write_missing, store, seed, 0.001) for seed in range(writers)]
    for writer in started:
        writer.join()
        assert writer.exitcode == 0
    shards, contexts = whole(store)
    holds_all(store, range(CONTEXTS))
    fact(
        f"{writers} writers at once: {shards} shards, {contexts} contexts, {CONTEXTS} bound, 0 lost"
    )


def test_a_place_with_no_room_is_one_line_and_stays_whole(
    tmp_path: Path, fact: Callable[[str], None], process: Callable[..., Any]
) -> None:
    """Real refusals by the system, at every size up to the largest file of a shard."""
    store = named(tmp_path)
    fill(store, range(20), shard_steps=20)
    shard = store / "shards" / shard_ids(open_storage(store))[0]
    largest = max(path.stat().st_size for path in shard.rglob("*") if path.is_file())
    limits = sorted({0, 1, *range(50, largest, 50)})
    for limit in limits:
        writer = process(write_with_small_files, store, limit)
        writer.join()
        assert writer.exitcode == 2, limit
        assert whole(store) == (4, 20)
        assert list((store / "open").iterdir()) == []
    fact(f"writes cut short by the system at {len(limits)} sizes: 0 stores damaged")


@pytest.mark.parametrize("step", ["zarr", "file", "sync", "read back", "rename"])
def test_a_full_disk_at_any_step_is_one_line(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = named(tmp_path)
    fill(store, range(20), shard_steps=20)
    place = {
        "zarr": "zarr.create_array",
        "file": "pathlib.Path.write_bytes",
        "sync": "pact_offline.files.os.fsync",
        "read back": "pact_offline.cache.storage.read_from_disk",
        "rename": "pathlib.Path.rename",
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            fill_from(store, 20)
    assert "\n" not in str(caught.value)
    assert whole(store) == (4, 20)
    assert list((store / "open").iterdir()) == []


def test_a_read_only_place_is_one_line(tmp_path: Path, process: Callable[..., Any]) -> None:
    store = named(tmp_path)
    fill(store, range(20), shard_steps=20)
    for path in (tmp_path, *tmp_path.parents[:2], store):
        path.chmod(0o755)
    for path in (store, store / "open", store / "shards"):
        path.chmod(0o555)
    writer = process(write_as_nobody, store)
    writer.join()
    for path in (store, store / "open", store / "shards"):
        path.chmod(0o755)
    assert writer.exitcode == 2
    assert whole(store) == (4, 20)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_scoring_ends_with_one_line_and_the_next_run_goes_on(
    sent: signal.Signals, code: int, tmp_path: Path, aligned: Path, tokens_file: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    rows = [{"prompt": f"Parcel {i}", "response": f"Shipping {i}"} for i in range(4000)]
    command = [
        "score", "--model", aligned, "--rows", write_rows(tmp_path / "rows.jsonl", rows),
        "--safety-tokens", tokens_file, "--cache", tmp_path / "cache", "--dtype", "float32",
        "--backend", "transformers", "--shard-steps", 500, "--batch-tokens", 128,
        "-o", tmp_path / "targets.json",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pact_offline", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob("cache/*/shards/*/shard.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    error = process.communicate()[1]
    assert process.returncode == code, error
    if sent == signal.SIGINT:
        assert error.splitlines()[-1] == (
            "pact-offline: interrupted; what was scored is in the cache, and the same command goes "
            "on from there"
        )
    assert "Traceback" not in error
    assert not (tmp_path / "targets.json").exists()
    (store,) = (tmp_path / "cache").iterdir()
    _, kept = whole(store)
    assert 0 < kept < 8000
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["known"] == kept
    assert len(TargetCache.open(tmp_path / "targets.json", verify_all=True)) == 4000

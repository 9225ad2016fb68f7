"""One contract for every place a store can live in: a disk, memory, and a real S3 server."""

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import write_rows
from stores import (
    IDENTITY,
    binding,
    context,
    fill,
    labels,
    list_shards,
    named,
    places_of,
    read,
    read_as_worker,
    values,
    whole,
)

from pact_offline.cache.format import SIDECAR, shard_ids
from pact_offline.cache.identity import read_identity
from pact_offline.cache.inspect import drop_shards, list_stores, verify_store
from pact_offline.cache.storage import (
    OPEN,
    LocalStorage,
    RemoteStorage,
    Storage,
    join,
    open_storage,
)
from pact_offline.cache.store import Store
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import DamagedError, StoreError

KINDS = ["disk", "memory", "s3"]
FILES = [
    "contexts.arrow",
    "log_confidence.zarr/zarr.json",
    "log_confidence.zarr/c/0/0",
    "label.zarr/zarr.json",
    "label.zarr/c/0",
    SIDECAR,
]


@contextmanager
def serving(module: str, *options: str) -> Iterator[str]:
    """The URL of a server module that is given a free port as its last option."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A process of its own: vLLM looks at every module here, and those of a web server object.
    server = subprocess.Popen(
        [sys.executable, "-m", module, *options, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with serving("moto.server", "-p") as url:
        yield url


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty place of each kind."""
    if request.param == "disk":
        yield str(tmp_path / "a place")
        return
    if request.param == "http":  # of what lies in "served"
        folder = tmp_path / "served"
        folder.mkdir()
        with serving("http.server", "--bind", "127.0.0.1", "-d", str(folder)) as url:
            yield url
        return
    name = f"cache-{uuid.uuid4().hex[:8]}"
    if request.param == "memory":
        yield f"memory://{name}"
        return
    import s3fs

    for key, value in {
        "AWS_ENDPOINT_URL": request.getfixturevalue("s3_server"),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/a/place"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def storage(place: str) -> Storage:
    return open_storage(place)


class TestEveryStorage:
    def test_a_file_is_written_read_listed_and_removed(self, storage: Storage) -> None:
        assert storage.names() == []
        assert not storage.has("x/one")
        storage.write("x/one", b"hello")
        assert storage.has("x/one")
        assert storage.names("x") == ["one"]
        assert storage.read("x/one", 5) == b"hello"
        assert storage.size("x/one") == 5
        storage.write("x/one", b"again")
        assert storage.read("x/one", 99) == b"again"
        storage.remove_file("x/one")
        storage.remove_file("x/one")
        assert not storage.has("x/one")

    def test_the_age_of_a_folder_is_that_of_its_newest_file(self, storage: Storage) -> None:
        storage.write("x/one", b"hello")
        assert 0 <= storage.age("x") + 2 < 60

    def test_a_longer_file_than_allowed_is_not_read(self, storage: Storage) -> None:
        storage.write("one", b"hello")
        with pytest.raises(StoreError, match="expected at most 4 bytes"):
            storage.read("one", 4)

    def test_what_is_missing_is_one_line(self, storage: Storage) -> None:
        with pytest.raises(StoreError, match="nowhere: cannot be used") as caught:
            storage.read("nowhere", 9)
        assert "\n" not in str(caught.value)

    def test_a_folder_is_committed_and_removed_whole(self, storage: Storage) -> None:
        storage.commit("things/one", {"last": b"x", "deep/er/file": b"abc"}, last="last")
        assert storage.names(OPEN) == []
        assert storage.names("things") == ["one"]
        assert storage.size("things/one") == 4
        local = storage.local("things/one", ("last", "deep/er/file"))
        assert (local / "deep" / "er" / "file").read_text() == "abc"
        storage.remove("things/one", first="last")
        assert storage.names("things") == []

    def test_a_store_is_filled_read_and_repaired(self, place: str) -> None:
        store = join(place, f"s-{IDENTITY.digest[:12]}")
        fill(store, range(6), shard_steps=8)
        fill(store, range(6, 9))
        opened = Store(store)
        for number in range(9):
            np.testing.assert_allclose(read(opened, number), values(number), rtol=1e-3)
            own = opened.read_labels(places_of(opened, number))
            np.testing.assert_allclose(own, labels(number), rtol=1e-3)
        again = pickle.loads(pickle.dumps(opened))  # noqa: S301
        np.testing.assert_allclose(read(again, 5), values(5), rtol=1e-3)
        assert verify_store(store)[:2] == (4, 9)
        (listed,) = list_stores(place)
        assert listed["contexts"] == 9

        storage = open_storage(store)
        assert read_identity(storage) == IDENTITY
        damaged = shard_ids(storage)[0]
        chunk = f"shards/{damaged}/log_confidence.zarr/c/0/0"
        storage.write(chunk, b"x" + storage.read(chunk, 9999)[1:])
        found = verify_store(store)
        assert list(found.bad) == [damaged]
        assert chunk in found.bad[damaged]
        drop_shards(store, [damaged])
        assert verify_store(store).bad == {}
        fill(store, range(9))
        assert (Store(store).locate([context(n).key for n in range(9)]) >= 0).all()

    def test_a_writer_killed_before_the_end_leaves_no_shard(self, place: str) -> None:
        """Everything but the sidecar has been copied; on a disk nothing is there at all."""
        store = join(place, f"s-{IDENTITY.digest[:12]}")
        fill(store, range(3))
        storage = open_storage(store)
        shard = shard_ids(storage)[0]
        names = tuple(file for file in FILES if file != SIDECAR)
        local = storage.local(f"shards/{shard}", names)
        for name in names:
            storage.write(f"shards/{'0' * 32}/{name}", (local / name).read_bytes())
        assert shard_ids(storage) == [shard]
        assert len(Store(store)) == 3

    def test_the_command_line_scores_and_trains_from_it(
        self, place: str, aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
        run: Callable[..., Result],
    ) -> None:  # fmt: skip
        common = ["--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]
        score = ["score", *common, "--backend", "transformers", "--dtype", "float32"]
        targets = tmp_path / "targets.json"
        result = run(*score, "--cache", place, "-o", targets)
        assert result.exit_code == 0, result.output
        assert len(TargetCache.open(targets, verify_all=True, cache=place)) == 12
        again = run(*score, "--cache", place, "-o", targets)
        assert "15 known, 0 scored" in again.output
        trained = run(
            "finetune", *common, "--targets", targets, "--cache", place, "--dtype", "float32",
            "--epochs", 1, "-o", tmp_path / "adapter",
        )  # fmt: skip
        assert trained.exit_code == 0, trained.output
        listed = run("cache", "ls", place).output
        assert str(targets) in listed
        write_rows(rows_file, [{"prompt": "Another row", "response": "Sales"}])
        targets.unlink()
        removed = run("cache", "gc", place, "--forget-missing", "--older-than", 0, "--yes")
        assert "1 unused shards" in removed.output
        assert run("cache", "ls", place, "--json").output.count('"shards": 0') == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [("nosuch://x/y", "nosuch"), ("s3://no-such-bucket-here/x", "cannot be")],
)
def test_a_place_that_cannot_be_used_is_one_line(
    url: str, expected: str, s3_server: str, aligned: Path, rows_file: Path, tokens_file: Path,
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    line = fails(
        "score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--backend", "transformers", "--cache", url, "-o", tmp_path / "targets.json",
    )  # fmt: skip
    assert url in line
    assert expected in line
    assert not (tmp_path / "targets.json").exists()


def test_a_remote_shard_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"memory://once-{uuid.uuid4().hex}/s-{IDENTITY.digest[:12]}"
    fill(store, range(4))
    opened = Store(store)
    read(opened, 0)
    fetched: list[Any] = []
    monkeypatch.setattr(RemoteStorage, "local", lambda *args: fetched.append(args))
    for number in range(4):
        read(opened, number)
    assert fetched == []


def test_a_link_in_a_store_is_refused(tmp_path: Path) -> None:
    store = tmp_path / f"s-{IDENTITY.digest[:12]}"
    fill(store, range(4))
    (shard,) = shard_ids(open_storage(store))
    outside = tmp_path / "outside"
    for name in (f"{shard}/contexts.arrow", f"{shard}/{SIDECAR}", shard):
        path = store / "shards" / name
        shutil.move(path, outside)
        path.symlink_to(outside)
        with pytest.raises(StoreError, match="expected no symbolic link"):
            Store(store)
        path.unlink()
        shutil.move(outside, path)
    assert len(Store(store)) == 4


NAME = f"s-{IDENTITY.digest[:12]}"


def bound(store: str, path: Path, numbers: range = range(8)) -> Path:
    """A targets.json with a row for each context, written by hand as anyone's could be."""
    opened = Store(store)
    binding(store, numbers, opened.shards_of(places_of(opened, *numbers))).save(path)
    return path


def copies_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("pact-offline-")]


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("place", ["disk", "http", "s3"], indirect=True)
def test_workers_read_what_this_process_reads(
    place: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what nobody has read before; their copies go with them, and ours stay."""
    fill(tmp_path / "served" / NAME if "http" in place else join(place, NAME), range(8), 8)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(ours))
    targets = TargetCache.open(bound(join(place, NAME), tmp_path / "t.json"), cache=place)
    right = [values(number).astype(np.float16).astype(np.float32) for number in range(8)]
    np.testing.assert_array_equal(targets[0].full, right[0])
    copies = copies_in(ours)
    env = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    start_one = multiprocessing.get_context(start).Process
    args = (targets, right, str(theirs), env)
    workers = [start_one(target=read_as_worker, args=args) for _ in range(2)]
    del args
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert copies_in(theirs) == []
    assert copies_in(ours) == copies
    np.testing.assert_array_equal(targets[7].full, right[7])
    del targets, worker, workers
    gc.collect()
    assert copies_in(ours) == []


def test_a_fork_makes_copies_of_its_own_and_leaves_its_parents() -> None:
    storage = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    storage.write("one/file", b"x")
    copy = storage.local("one", ("file",)) / "file"
    child = os.fork()
    if not child:
        storage.release("one")
        own = storage.local("one", ("file",)) / "file"
        is_right = own != copy and own.read_bytes() == b"x"
        del storage
        gc.collect()
        os._exit(0 if is_right and not own.exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert copy.read_bytes() == b"x"


def test_a_worker_outlives_the_copies_it_was_handed(tmp_path: Path) -> None:
    store = f"memory://{uuid.uuid4().hex}/{NAME}"
    fill(store, range(4))
    opened = Store(store)
    read(opened, 1)
    handed = pickle.loads(pickle.dumps(opened))  # noqa: S301
    del opened
    gc.collect()
    np.testing.assert_allclose(read(handed, 1), values(1), rtol=1e-3)


def test_half_a_download_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    storage.write("one/file", b"0123456789")

    def cut_short(remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(b"01234")
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(storage._fs, "get_file", cut_short)
        with pytest.raises(StoreError, match="reset by peer"):
            storage.local("one", ("file",))
        assert list(storage._copy_of("one").iterdir()) == []
    assert (storage.local("one", ("file",)) / "file").read_bytes() == b"0123456789"


def test_a_wrong_download_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"memory://{uuid.uuid4().hex}/{NAME}"
    fill(store, range(4))
    opened = Store(store)
    fs = opened._storage._fs  # type: ignore[attr-defined]
    right = fs.get_file

    def flipped(remote: str, local: str, **options: Any) -> None:
        right(remote, local, **options)
        Path(local).write_bytes(b"x" + Path(local).read_bytes()[1:])

    with monkeypatch.context() as patch:
        patch.setattr(fs, "get_file", flipped)
        with pytest.raises(DamagedError):
            read(opened, 1)
    np.testing.assert_allclose(read(opened, 1), values(1), rtol=1e-3)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", ["disk", "memory"], indirect=True)
def test_a_byte_that_was_written_wrong_is_found_and_nothing_is_committed(
    place: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = join(place, NAME)
    fill(store, range(3))
    storage = open_storage(store)
    before = storage.size("")

    def wrong(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    with monkeypatch.context() as patch:
        if isinstance(storage, RemoteStorage):
            put = storage._fs.pipe_file

            def pipe(path: str, data: bytes) -> None:
                put(path, wrong(data) if path.endswith(file) else data)

            patch.setattr(storage._fs, "pipe_file", pipe)
        else:
            write = Path.write_bytes

            def write_bytes(path: Path, data: bytes) -> int:
                return write(path, wrong(data) if str(path).endswith(file) else data)

            patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(StoreError, match=f"{file}: expected the bytes that were written") as e:
            fill(store, range(3, 6))
    assert "\n" not in str(e.value)
    assert whole(store) == (1, 3)
    if place.startswith("memory"):
        assert storage.names(OPEN) == []
    else:
        assert storage.size("") == before
    fill(store, range(3, 6))
    assert whole(store) == (2, 6)


class Strangers(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


def test_a_url_in_a_targets_file_is_asked_for_nothing_unless_it_was_named(
    tmp_path: Path, aligned: Path, rows_file: Path, tokens_file: Path, fails: Callable[..., str]
) -> None:
    fill(named(tmp_path), range(8))
    path = bound(str(named(tmp_path)), tmp_path / "t.json")
    common = ["--rows", rows_file, "--safety-tokens", tokens_file]
    server = HTTPServer(("127.0.0.1", 0), Strangers)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for store in (f"{url}/cache/{NAME}", f"simplecache::{url}/x", f"file:/{url}"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"store": store}))
            for command in (
                ["cache", "verify", path],
                ["cache", "show", path, 0, "--safety-tokens", tokens_file],
                ["cache", "audit", path, "--model", aligned, *common],
                ["finetune", "--model", aligned, *common, "--targets", path, "-o", tmp_path / "a"],
                ["bench", "equality", "--model", aligned, *common, "--targets", path],
                ["cache", "verify", path, "--cache", f"{url}/cach"],
                ["cache", "verify", path, "--cache", f"{url}/cache/{NAME}/deeper"],
            ):
                line = fails(*command)
                assert f"{path}: store: " in line
                assert store in line
                assert "--cache URL" in line
        assert Strangers.asked == []
        path.write_text(json.dumps(json.loads(path.read_text()) | {"store": f"{url}/cache/{NAME}"}))
        for cache in (f"{url}/cache", f"{url}/cache/", f"{url}/cache/{NAME}"):
            assert "expected shard" in fails("cache", "verify", path, "--cache", cache)
        assert Strangers.asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_path_in_a_targets_file_is_followed(tmp_path: Path) -> None:
    fill(named(tmp_path), range(8))
    path = bound(str(named(tmp_path)), tmp_path / "t.json")
    for store in (named(tmp_path).name, str(named(tmp_path)), f"file://{named(tmp_path)}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"store": store}))
        assert len(TargetCache.open(path, verify_all=True)) == 8


def test_a_shard_that_is_removed_while_it_is_checked_is_not_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = named(tmp_path)
    fill(store, range(6), shard_steps=8)
    victim = list_shards(store)[1]
    storage, local = open_storage(store), LocalStorage.local

    def removing(self: LocalStorage, folder: str, names: tuple[str, ...]) -> Path:
        if folder.endswith(victim) and names[0].endswith("c/0/0"):
            storage.remove(folder, first=SIDECAR)
        return local(self, folder, names)

    monkeypatch.setattr(LocalStorage, "local", removing)
    assert whole(store) == (2, 4)


def test_a_place_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used: File name too long"):
        open_storage(tmp_path / ("a" * 300)).has("identity.json")

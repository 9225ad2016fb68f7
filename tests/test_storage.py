"""One contract for every place a store can live in: a disk, memory, and a real S3 server."""

import pickle
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import write_rows
from stores import IDENTITY, context, fill, read, values

from pact_offline.cache.format import SIDECAR, shard_ids
from pact_offline.cache.identity import read_identity
from pact_offline.cache.inspect import drop_shards, list_stores, verify_store
from pact_offline.cache.storage import OPEN, RemoteStorage, Storage, join, open_storage
from pact_offline.cache.store import Store
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import StoreError

KINDS = ["disk", "memory", "s3"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A process of its own: vLLM looks at every module here, and those of a web server object.
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
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


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty place of each kind."""
    if request.param == "disk":
        yield str(tmp_path / "a place")
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
        names = ("contexts.arrow", "log_confidence.zarr/zarr.json", "log_confidence.zarr/c/0/0")
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

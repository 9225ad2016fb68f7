"""Whether the targets that a targets.json names are there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import binding, fill, list_shards, named

from pact_offline.cache import presence
from pact_offline.cache.presence import is_there


@pytest.fixture
def bound(tmp_path: Path) -> tuple[Path, Path]:
    """A store of several shards, and a targets.json that names them."""
    store, targets = named(tmp_path), tmp_path / "targets.json"
    fill(store, range(6), shard_steps=8)
    shards = list_shards(store)
    assert len(shards) > 1
    binding(store, range(6), shards).save(targets)
    return store, targets


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_store_is_there_also_after_a_move(bound: tuple[Path, Path], tmp_path: Path) -> None:
    store, targets = bound
    assert is_there(targets, str(store.parent))
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    shutil.rmtree(store)
    assert is_there(tmp_path.with_name("moved") / targets.name, "elsewhere")
    assert not is_there(targets, str(store.parent))


@pytest.mark.parametrize(
    "harm",
    [
        lambda store, targets: shutil.rmtree(sorted(store.glob("shards/*"))[0]),
        lambda store, targets: (sorted(store.glob("shards/*"))[-1] / "shard.json").unlink(),
        lambda store, targets: (store / "identity.json").unlink(),
        lambda store, targets: targets.write_text("{"),
        lambda store, targets: change(targets, format_version=2),
        lambda store, targets: next(targets.parent.glob("targets-*.arrow")).unlink(),
        lambda store, targets: next(targets.parent.glob("targets-*.arrow")).write_bytes(b"x"),
    ],
    ids=[
        "a shard",
        "a sidecar",
        "identity",
        "half a file",
        "an older format",
        "keys",
        "other keys",
    ],
)
def test_what_is_gone_in_part_is_not_there(
    harm: Callable[[Path, Path], None], bound: tuple[Path, Path]
) -> None:
    store, targets = bound
    harm(store, targets)
    assert not is_there(targets, str(store.parent))


def test_only_the_cache_of_the_config_is_asked_over_a_network(
    bound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(presence, "open_storage", lambda place: asked.append(place) or 1 / 0)
    change(bound[1], store="s3://stranger/store")
    assert not is_there(bound[1], "s3://ours/cache")
    assert not is_there(bound[1], "s3://strange")
    assert asked == []

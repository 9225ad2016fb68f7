"""`pact-offline cache`: ls, show, verify, audit, gc."""

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import score_command, write_rows
from stores import bind, conversation, fill, named

from pact_offline.cache.format import shard_ids
from pact_offline.cache.storage import open_storage
from pact_offline.cache.targets import TargetCache

Run = Callable[..., Result]


@pytest.fixture
def command(aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path) -> list[Any]:
    return score_command(aligned, rows_file, tokens_file, tmp_path)


@pytest.fixture
def targets(command: list[Any], tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "targets.json"
    result = run(*command, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def store_of(targets: Path) -> Path:
    return next((targets.parent / "cache").iterdir())


def damage(targets: Path) -> str:
    """Change one byte of the store's only shard; its id."""
    (shard,) = shard_ids(open_storage(store_of(targets)))
    chunk = store_of(targets) / "shards" / shard / "log_confidence.zarr" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    return shard


def test_ls_says_what_is_there_and_who_uses_it(targets: Path, aligned: Path, run: Run) -> None:
    listed = json.loads(run("cache", "ls", targets.parent / "cache", "--json").stdout)
    (store,) = listed
    assert (store["contexts"], store["shards"]) == (15, 1)
    assert store["bytes"] == sum(
        path.stat().st_size for path in store_of(targets).rglob("*") if path.is_file()
    )
    assert store["used_by"] == [{"targets": str(targets), "rows": 12, "missing": False}]
    shown = run("cache", "ls", targets.parent / "cache").stdout
    assert str(aligned) in shown
    assert f"used by {targets}, 12 rows" in shown
    targets.unlink()
    assert "(gone)" in run("cache", "ls", targets.parent / "cache").stdout


def test_a_binding_made_again_is_remembered_once(
    targets: Path, command: list[Any], rows_file: Path, run: Run
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    write_rows(rows_file, rows[:5])
    assert run(*command, "-o", targets).exit_code == 0
    (store,) = json.loads(run("cache", "ls", targets.parent / "cache", "--json").stdout)
    assert store["used_by"] == [{"targets": str(targets), "rows": 5, "missing": False}]


def test_show_is_a_table_of_steps_and_tokens(
    targets: Path, tokens_file: Path, rows_file: Path, aligned: Path, run: Run, fails: Any
) -> None:
    show = ["cache", "show", targets, 1, "--safety-tokens", tokens_file]
    shown = run(*show, "--rows", rows_file, "--model", aligned, "--columns", 3).stdout
    lines = shown.splitlines()
    assert lines[0].startswith("full context")
    assert lines[1].split()[:6] == ["step", "next", "token", "its", "own", "rest"]
    assert "Shipping" in lines[2] or "S" in lines[2]
    assert len(lines[2].split()) == 2 + 2 + 3  # step, token, its own, the rest, three safety tokens
    assert any(line.startswith("response-only context") for line in lines)
    assert run(*show).exit_code == 0  # without rows: no tokens, all else
    assert "expected a row from 0 to 11, found 12" in fails(
        "cache", "show", targets, 12, "--safety-tokens", tokens_file
    )


@pytest.fixture
def of_two_turns(command: list[Any], rows_file: Path, tmp_path: Path, run: Run) -> Path:
    """A targets.json of a row of two turns and a row of one, stored exactly."""
    both = conversation(("My parcel", "Billing"), ("And my money?", "Returns, I think"))
    write_rows(rows_file, [both, conversation(("My parcel", "Shipping"))])
    path = tmp_path / "turns.json"
    result = run(*command, "-o", path, "--stored-dtype", "float32")
    assert result.exit_code == 0, result.output
    return path


def test_show_counts_each_turn_from_its_first_token(
    of_two_turns: Path, tokens_file: Path, rows_file: Path, aligned: Path, run: Run
) -> None:
    show = ["cache", "show", of_two_turns, 0, "--safety-tokens", tokens_file, "--columns", 0]
    shown = run(*show, "--rows", rows_file, "--model", aligned).stdout
    blocks = [block.splitlines()[2:] for block in shown.split("\n\n")]
    cache = TargetCache.open(of_two_turns)
    assert len(blocks) == 2
    for kind, lines in zip(("full", "response_only"), blocks, strict=True):
        own = 100 * np.exp(cache.read_labels([0], kind))
        np.testing.assert_allclose([float(line.split()[-2]) for line in lines], own, atol=1e-3)
        numbers = [int(line[:4]) for line in lines]
        second = numbers.index(0, 1)
        assert numbers == [*range(second), *range(len(lines) - second)]
        tokens = [line[6:19].strip() for line in lines]
        assert "".join(tokens[:second]) == "Billing<|im_end|>\\n"
        assert "".join(tokens[second:]) == "Returns,\u00b7I\u00b7think<|im_end|>\\n"
    full, only = (cache.read_labels([0], kind) for kind in ("full", "response_only"))
    assert full.tolist() != only.tolist()
    plain = run(*show).stdout  # without rows nobody knows where a turn begins
    counted = [int(line[:4]) for line in plain.split("\n\n")[0].splitlines()[2:]]
    assert counted == list(range(len(blocks[0])))


def test_audit_takes_rows_of_several_turns(
    of_two_turns: Path, command: list[Any], run: Run
) -> None:
    value = json.loads(run("cache", "audit", of_two_turns, *command[1:7], "--json").stdout)
    cache = TargetCache.open(of_two_turns)
    assert value["contexts"] == 3 + 2
    assert value["steps"] == sum(len(values) for row in (0, 1) for values in cache[row])
    for name in ("difference", "label_difference"):
        assert value[name]["max"] < 1e-4
    assert value["pact_difference"] < 1e-4


@pytest.mark.parametrize("what", ["store", "directory"])
def test_verify_says_which_shard_and_why_and_repairs(
    what: str, targets: Path, command: list[Any], run: Run, fails: Any
) -> None:
    place = store_of(targets) if what == "store" else targets.parent / "cache"
    assert "1 shards with 15 contexts are whole" in run("cache", "verify", place).stdout
    assert "1 shards with 15 contexts are whole" in run("cache", "verify", targets).stdout
    shard = damage(targets)
    found = run("cache", "verify", place)
    assert found.exit_code == 1
    assert f"{shard}/log_confidence.zarr/c/0/0: expected the bytes" in found.stdout
    assert "expected the bytes that were written" in fails("cache", "verify", targets)
    assert shard in run("cache", "verify", place, "--repair").stdout
    again = json.loads(run(*command, "-o", targets, "--json").stdout)
    assert again["scored"] == 15
    assert run("cache", "verify", targets).exit_code == 0


def test_a_damaged_shard_is_left_out_and_its_contexts_scored_again(
    command: list[Any], tmp_path: Path, run: Run
) -> None:
    targets = tmp_path / "targets.json"
    assert run(*command, "-o", targets, "--shard-steps", 20).exit_code == 0
    before = TargetCache.open(targets)
    right = [before[index] for index in range(12)]
    shards = store_of(targets) / "shards"
    table, chunk, *others = sorted(shards.iterdir())
    assert others
    lost = [json.loads((one / "shard.json").read_text())["contexts"] for one in (table, chunk)]
    (table / "contexts.arrow").write_bytes(b"")
    (chunk / "log_confidence.zarr" / "c" / "0" / "0").unlink()
    result = run(*command, "-o", targets, "--json")
    again = json.loads(result.stdout)
    assert (again["scored"], again["known"]) == (sum(lost), 15 - sum(lost))
    for shard in (table, chunk):
        assert shard.name in result.stderr
    assert f"`pact-offline cache verify {shards.parent} --repair`" in result.stderr
    after = TargetCache.open(targets, verify_all=True)
    assert not {table.name, chunk.name} & set(after.binding.shards)
    for index in range(12):
        for ours, theirs in zip(after[index], right[index], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_binding_to_a_damaged_shard_is_refused_and_repair_lets_score_fill_just_the_gap(
    command: list[Any], tmp_path: Path, run: Run, fails: Any
) -> None:
    targets = tmp_path / "targets.json"
    assert run(*command, "-o", targets, "--shard-steps", 20).exit_code == 0
    shards = store_of(targets) / "shards"
    victim = sorted(shards.iterdir())[0]
    lost = json.loads((victim / "shard.json").read_text())["contexts"]
    (victim / "contexts.arrow").write_bytes(b"")
    assert "--repair" in fails("cache", "verify", targets)  # the line says how to mend it
    assert run("cache", "verify", shards.parent, "--repair").exit_code == 0
    again = json.loads(run(*command, "-o", targets, "--json").stdout)
    assert (again["scored"], again["known"]) == (lost, 15 - lost)


def test_a_file_more_in_a_shard_is_found(targets: Path, run: Run) -> None:
    (shard,) = (store_of(targets) / "shards").iterdir()
    (shard / "extra.py").write_text("")
    found = run("cache", "verify", store_of(targets))
    assert found.exit_code == 1
    assert "found 'extra.py'" in found.stdout


def test_a_renamed_store_is_refused(targets: Path, fails: Any) -> None:
    moved = store_of(targets).rename(targets.parent / "cache" / "mine")
    assert "expected a directory name that ends with" in fails("cache", "verify", moved)


@pytest.mark.parametrize("stored", ["uint8", "float16", "float32"])
def test_audit_finds_a_right_cache_within_the_noise(
    stored: str, command: list[Any], targets: Path, tokens_file: Path, rows_file: Path,
    aligned: Path, run: Run,
) -> None:  # fmt: skip
    assert run(*command, "-o", targets, "--stored-dtype", stored).exit_code == 0
    audit = ["cache", "audit", targets, *command[1:7], "--sample", 6]
    found = run(*audit)
    assert found.exit_code == 0, found.output
    assert "within the tolerance" in found.stdout
    value = json.loads(run(*audit, "--json").stdout)
    assert value["contexts"] == 12
    if stored == "float32":
        assert value["difference"]["max"] < 1e-4
        assert value["label_difference"]["max"] < 1e-4
        assert value["pact_difference"] < 1e-4


def test_audit_finds_a_wrong_cache(
    targets: Path, command: list[Any], base: Path, tmp_path: Path, run: Run
) -> None:
    """A cache that says it is of one model, with another's values."""
    scored = run(*["score", "--model", base, *command[3:]], "-o", tmp_path / "other.json")
    assert scored.exit_code == 0, scored.output
    from pact_offline.cache.store import Store
    from pact_offline.cache.writer import StoreWriter
    from pact_offline.models.locate import locate_model
    from pact_offline.scoring.dataset import prepare
    from pact_offline.settings.stages import ScoreSettings

    right, wrong = sorted(
        (Store(path) for path in (tmp_path / "cache").iterdir()),
        key=lambda store: "aligned" not in store.place,
    )
    for shard in right.shards:
        open_storage(right.place).remove(f"shards/{shard.id}", first="shard.json")
    settings = ScoreSettings.model_validate({})
    known = prepare(locate_model(str(base)), [command[4]], command[6], tmp_path / "cache", settings)
    with StoreWriter(right.place, right.identity, 10**6, {}) as writer:
        for context in known.contexts(known.distinct):
            at = wrong.locate([context.key])
            writer.add(context, wrong.read(at), wrong.read_labels(at))
    assert run(*command, "-o", targets).exit_code == 0
    assert run("cache", "verify", targets).exit_code == 0  # every byte is as it was written
    found = run("cache", "audit", targets, *command[1:7])
    assert found.exit_code == 1
    assert "past the tolerance" in found.stdout
    value = json.loads(run("cache", "audit", targets, *command[1:7], "--json").stdout)
    assert value["label_difference"]["mean"] > 0.1


def test_gc_removes_what_no_targets_use_after_asking(
    targets: Path, command: list[Any], rows_file: Path, run: Run
) -> None:
    cache = targets.parent / "cache"
    gc = ["cache", "gc", cache, "--older-than", 0]
    assert "nothing to remove" in run(*gc).stdout
    other = write_rows(rows_file.with_name("other.jsonl"), [{"prompt": "x", "response": "Sales"}])
    second = targets.with_name("second.json")
    replaced = [other if part == rows_file else part for part in command]
    assert run(*replaced, "-o", second).exit_code == 0
    second.unlink()
    assert "nothing to remove" in run(*gc).stdout  # it may only have moved
    young = run("cache", "gc", cache, "--forget-missing", "--yes")
    assert "0 unused shards" in young.stdout  # a job may still be about to bind it
    assert len(shard_ids(open_storage(store_of(targets)))) == 2
    asked = run(*gc)
    assert "1 unused shards" in asked.stdout
    assert asked.exit_code == 1  # no answer is no
    assert len(shard_ids(open_storage(store_of(targets)))) == 2
    assert "removed" in run(*gc, "--yes").stdout
    assert len(shard_ids(open_storage(store_of(targets)))) == 1
    assert run("cache", "verify", targets).exit_code == 0


def test_gc_keeps_what_was_bound_while_it_asked(
    targets: Path, command: list[Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = targets.parent / "cache"
    again = targets.with_name("again.json")
    targets.unlink()

    def meanwhile(*args: Any, **kwargs: Any) -> bool:
        assert run(*command, "-o", again).exit_code == 0
        return True

    monkeypatch.setattr("pact_offline.cli.cache.click.confirm", meanwhile)
    asked = run("cache", "gc", cache, "--forget-missing", "--older-than", 0)
    assert "1 unused shards" in asked.stdout
    assert run("cache", "verify", again).exit_code == 0


def test_gc_does_not_follow_links_out_of_a_store(targets: Path, fails: Any) -> None:
    outside = targets.parent / "documents"
    (outside / "thesis").mkdir(parents=True)
    os.utime(outside / "thesis", (0, 0))
    store = store_of(targets)
    shutil.rmtree(store / "open")
    (store / "open").symlink_to(outside)
    assert "expected no symbolic link" in fails("cache", "gc", store, "--yes")
    assert (outside / "thesis").is_dir()


def test_a_fault_of_the_place_is_no_damage(
    targets: Path, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read now may be whole: nothing is dropped."""

    def busy(path: Path) -> str:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("pact_offline.cache.shard.sha256_file", busy)
        line = fails("cache", "verify", store_of(targets), "--repair")
    assert "cannot be read: Too many open files" in line
    assert len(shard_ids(open_storage(store_of(targets)))) == 1


def test_a_binding_that_moved_to_another_store_leaves_the_first(
    targets: Path, command: list[Any], run: Run
) -> None:
    assert run(*command, "-o", targets, "--stored-dtype", "float32").exit_code == 0
    listed = json.loads(run("cache", "ls", targets.parent / "cache", "--json").stdout)
    used = {store["stored_dtype"]: len(store["used_by"]) for store in listed}
    assert used == {"uint8": 0, "float32": 1}


def test_verify_from_inside_and_of_nothing(
    targets: Path, run: Run, fails: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "found none" in fails("cache", "verify", tmp_path / "empty")
    monkeypatch.chdir(store_of(targets))
    assert run("cache", "verify", ".").exit_code == 0


def test_what_others_are_writing_does_not_disturb(
    targets: Path, command: list[Any], run: Run
) -> None:
    store = store_of(targets)
    (store / "bindings" / ".half.json.1234.tmp").write_text("{")
    (store / "shards" / ".DS_Store").write_text("x")
    other = store.with_name("damaged-000000000000")
    (other / "bindings").mkdir(parents=True)
    (other / "identity.json").write_text("{}")
    (other / "bindings" / f"{'0' * 32}.json").write_text("{}")
    assert run(*command, "-o", targets).exit_code == 0
    assert run("cache", "verify", store).exit_code == 0
    assert "nothing to remove" in run("cache", "gc", store, "--older-than", 0, "--yes").stdout


def test_gc_leaves_a_live_writers_folder_alone(targets: Path, run: Run) -> None:
    old, new = (store_of(targets) / "open" / (name * 32) for name in ("a", "b"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    day_before = time.time() - 2 * 24 * 3600
    os.utime(old, (day_before, day_before))
    assert "1 leftovers" in run("cache", "gc", store_of(targets), "--yes").stdout
    assert not old.exists()
    assert new.exists()


def test_what_is_not_there_is_one_line(tmp_path: Path, fails: Any) -> None:
    assert "no such directory" in fails("cache", "ls", tmp_path / "nowhere")
    assert "no such" in fails("cache", "verify", tmp_path / "nowhere.json")
    assert "no such file" in fails(
        "cache", "show", tmp_path / "x.json", 0, "--safety-tokens", tmp_path / "t.json"
    )


def test_eight_bits_keep_what_counts() -> None:
    """Fine where a token is likely, coarse where it is not; minus infinity stays."""
    from pact_offline.cache.encoding import decode, encode

    values = np.log(np.array([[0.9, 0.5, 0.01, 1e-6], [1e-9, 0.2, 0.3, 0.999]], np.float32))
    values[1, 0] = -np.inf
    found = decode(encode(values, "uint8"))
    assert np.isneginf(found[1, 0])
    finite = np.isfinite(values)
    gap = np.abs(np.exp(found[finite]) - np.exp(values[finite]))
    assert gap.max() < 0.01
    assert np.abs(found[finite] - values[finite]).max() < 0.1
    for row in (
        np.zeros((1, 3)),
        np.full((1, 3), -np.inf),
        np.full((1, 3), -1e5),
    ):  # e^-254 is nothing
        again = decode(encode(row.astype(np.float32), "uint8"))
        expected = np.where(np.isinf(row), row, np.maximum(row, -254))  # e^-254 is nothing
        np.testing.assert_allclose(again, expected, rtol=1e-3)


def test_a_stray_folder_and_a_bad_store_are_named_and_the_rest_goes_on(
    targets: Path, command: list[Any], run: Run
) -> None:
    store, cache = store_of(targets), targets.parent / "cache"
    (shard,) = shard_ids(open_storage(store))
    shutil.copytree(store / "shards" / shard, store / "shards" / f"{shard}.bak")
    for name in ("aaa-foreign", "zzz-lost"):
        (cache / name / "shards" / ("0" * 32)).mkdir(parents=True)
    (cache / "aaa-foreign" / "identity.json").write_text("{}")
    (cache / "older").mkdir()
    older = (store / "identity.json").read_text()
    assert '"format_version": 3' in older
    older = older.replace('"format_version": 3', '"format_version": 2')
    (cache / "older" / "identity.json").write_text(older)
    (cache / "zzz-linked").mkdir()
    (cache / "zzz-linked" / "identity.json").symlink_to(store / "identity.json")
    (cache / "notes").mkdir()
    bad = {
        "aaa-foreign": "identity.json: expected the keys",
        "older": "expected 3, found 2, of another pact-offline; run `pact-offline score` again",
        "zzz-linked": "expected no symbolic link",
        "zzz-lost": "expected a store with identity.json",
    }

    listed = run("cache", "ls", cache)
    assert f"{shard}.bak: expected a shard" in listed.stdout
    assert "1 shards, 15 contexts" in listed.stdout
    found = {one["name"]: one for one in json.loads(run("cache", "ls", cache, "--json").stdout)}
    assert set(found) == {store.name, *bad}
    assert found[store.name]["contexts"] == 15
    assert [f"{shard}.bak" in line for line in found[store.name]["strays"]] == [True]
    verified = run("cache", "verify", cache)
    assert verified.exit_code == 1
    assert "1 shards with 15 contexts are whole" in verified.stdout
    collected = run("cache", "gc", cache, "--older-than", 0, "--yes")
    assert collected.exit_code == 0
    assert "nothing to remove" in collected.stdout
    for name, reason in bad.items():
        assert reason in found[name]["error"]
        for text in (listed.stdout, verified.stdout, collected.stderr):
            assert any(name in line and reason in line for line in text.splitlines()), (name, text)
    assert f"{shard}.bak: expected a shard" in collected.stderr

    alone = run("cache", "verify", store)
    assert (alone.exit_code, f"{shard}.bak: expected a shard" in alone.stdout) == (0, True)
    scored = run(*command, "-o", targets)
    assert (scored.exit_code, "15 known, 0 scored" in scored.stdout) == (0, True)
    assert f"{shard}.bak: expected a shard" in scored.stderr
    assert len(TargetCache.open(targets, verify_all=True)) == 12


def damage_somewhere(store: Path, targets: Path, draw: random.Random) -> str:
    """Do something to a file or folder of a store, or to the keys of a targets.json; say what."""
    path = draw.choice(sorted([*store.rglob("*"), *targets.parent.glob("*.arrow")]))
    how = draw.choice(["delete", "rename", "truncate", "garbage", "link", "folder", "copy"])
    if how == "copy":
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, path.with_name(f"{path.name}.bak"))
    elif how == "rename":
        path.rename(path.with_name(draw.choice([f"{path.name}.bak", "0" * 32, "identity.json"])))
    elif how in ("truncate", "garbage") and path.is_file():
        data = path.read_bytes()
        garbage = draw.choice([b"[" * 100_000, b"null", b"{}", draw.randbytes(len(data))])
        path.write_bytes(data[: draw.randrange(len(data))] if how == "truncate" else garbage)
    else:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        if how == "link":
            path.symlink_to(draw.choice([store.parent, Path("/nowhere"), store / "identity.json"]))
        elif how == "folder":
            path.mkdir()
        elif how in ("truncate", "garbage"):
            path.write_bytes(b"")
    return f"{how} {path}"


def test_two_hundred_damages_of_a_store_are_told_in_lines(tmp_path: Path, run: Run) -> None:
    """By every `cache` command that reads one; nothing but exit codes 0, 1 and 2."""
    harmed: set[str] = set()
    whole, now = tmp_path / "whole", tmp_path / "now"
    fill(named(whole / "cache"), range(6), shard_steps=16)
    bind(named(whole / "cache"), whole / "targets.json", range(6))
    tokens = tmp_path / "none.json"
    draw = random.Random(0)
    for number in range(200):
        shutil.copytree(whole, now)
        cache, store, path = now / "cache", named(now / "cache"), now / "targets.json"
        what: list[str] = []
        for _ in range(draw.choice([1, 1, 2])):
            with contextlib.suppress(OSError):  # a second one may find no place
                what.append(damage_somewhere(store, path, draw))
        commands = (
            ["ls", cache], ["verify", cache], ["verify", store], ["verify", path],
            ["show", path, 1, "--safety-tokens", tokens], ["ls", store, "--json"],
            ["gc", cache, "--older-than", 0, "--yes"], ["verify", cache, "--repair"],
        )  # fmt: skip
        for command in draw.sample(commands, 2):
            try:
                result = run("cache", *command)
            except Exception as error:
                raise AssertionError(f"{number}: {what}: {command}") from error
            assert result.exit_code in (0, 1, 2), (number, what, command, result.output)
            assert "Traceback" not in result.output
        harmed |= {word for text in what for word in ("targets-", "label.zarr") if word in text}
        shutil.rmtree(now)
    assert harmed == {"targets-", "label.zarr"}

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import Result
from conftest import ROOT, score_command, write_rows
from stores import (
    IDENTITY,
    bind,
    context,
    conversation,
    fill,
    labels,
    list_shards,
    named,
    places_of,
    read,
    row_keys,
    values,
    whole,
)

from pact_offline.cache import row_keys as row_keys_module
from pact_offline.cache.format import SCHEMA, shard_id_of
from pact_offline.cache.identity import Identity
from pact_offline.cache.inspect import verify_store, verify_targets
from pact_offline.cache.plain_arrow import to_bytes
from pact_offline.cache.row_keys import RowKeys, keys_place
from pact_offline.cache.store import Store
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import ScoringError, StoreError, TargetsMismatchError
from pact_offline.files import sha256_file
from pact_offline.models.locate import locate_model
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import CONTEXT_KINDS, Context, contexts_of
from pact_offline.rows.tokenized import TokenizedRows, tokenized_by
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.scoring.dataset import prepare
from pact_offline.settings.stages import ScoreSettings


def test_what_is_written_is_read(tmp_path: Path) -> None:
    fill(named(tmp_path), range(20), shard_steps=24)
    store = Store(named(tmp_path))
    assert len(list_shards(named(tmp_path))) == 4
    for number in (7, 0, 19, 7):
        found = read(store, number)
        np.testing.assert_allclose(found, values(number), rtol=1e-3)
        assert found.dtype == np.float32
    both = np.concatenate((values(19), values(2)))
    np.testing.assert_allclose(read(store, 19, 2), both, rtol=1e-3)
    keys = [context(99).key, context(2).key]
    assert store.locate(keys).tolist()[0] == -1
    packed = row_keys([99, 2]).keys
    assert store.find(packed).tolist() == np.repeat(store.locate(keys), 2).tolist()


@pytest.mark.parametrize("stored", ["uint8", "float16", "float32"])
def test_the_responses_own_tokens_are_read_as_they_were_written(
    stored: str, tmp_path: Path
) -> None:
    """Exactly beside exact values, in half precision beside the others; minus infinity too."""
    identity = Identity(**{**IDENTITY.__dict__, "stored_dtype": stored})
    written = {number: labels(number) for number in range(7)}
    written[3][1:3] = 0, -np.inf
    with StoreWriter(tmp_path, identity, 12, {}) as writer:
        for number, own in written.items():
            writer.add(context(number), values(number), own)
    store = Store(tmp_path)
    assert len(store.shards) == 3
    for numbers in ([6, 0], [3], [5, 4, 3, 5]):
        found = store.read_labels(places_of(store, *numbers))
        expected = np.concatenate([written[number] for number in numbers])
        if stored != "float32":
            expected = expected.astype(np.float16)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float32


def test_minus_infinity_survives(tmp_path: Path) -> None:
    with StoreWriter(named(tmp_path), IDENTITY, 9, {}) as writer:
        writer.add(context(1), np.full((4, 3), -np.inf, np.float32), labels(1))
    assert np.isneginf(read(Store(named(tmp_path)), 1)).all()


def test_a_context_of_another_shape_or_with_nan_is_refused(tmp_path: Path) -> None:
    with StoreWriter(named(tmp_path), IDENTITY, 9, {}) as writer:
        with pytest.raises(ScoringError, match=r"expected log-confidences \[4, 3\]"):
            writer.add(context(1), values(1, steps=3), labels(1))
        with pytest.raises(ScoringError, match="NaN"):
            writer.add(context(1), np.full((4, 3), np.nan, np.float32), labels(1))
        for own in (labels(1, steps=3), values(1)):
            with pytest.raises(ScoringError, match="expected log-probabilities of 4 tokens"):
                writer.add(context(1), values(1), own)
        with pytest.raises(ScoringError, match="NaN"):
            writer.add(context(1), values(1), np.array([-1, -2, np.nan, -3], np.float32))
    assert list_shards(named(tmp_path)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference", {"hub": "a/b", "commit": "d"}),
        ("safety_ids", (3, 5, 9)),
        ("header_ids", (1,)),
        ("engine", "test 2"),
        ("compute_dtype", "bfloat16"),
        ("stored_dtype", "float32"),
        ("format_version", 4),
    ],
)
def test_every_field_changes_the_identity(field: str, value: Any) -> None:
    other = Identity(**{**IDENTITY.__dict__, field: value})
    assert other.digest != IDENTITY.digest


def test_a_contexts_key_is_over_its_kind_spans_and_every_token() -> None:
    """As docs/cache-format.md has it."""
    spans, ids = ((1, 2), (3, 5)), [5, 6, 7, 8, 9]
    made = {Context("full", np.array(ids, np.int32), spans).key}
    numbers = struct.pack("<10i", 2, 1, 2, 3, 5, *ids)
    assert made == {hashlib.sha256(b"pact-offline context 3\nfull\n" + numbers).hexdigest()[:32]}
    made.add(Context("response_only", np.array(ids, np.int32), spans).key)
    for other in (((1, 5),), ((1, 3), (3, 5)), ((3, 5),)):
        made.add(Context("full", np.array(ids, np.int32), other).key)
    for place in range(len(ids)):
        changed = np.array(ids, np.int32)
        changed[place] += 1
        made.add(Context("full", changed, spans).key)
    assert len(made) == 1 + 1 + 3 + 5


def test_a_writer_killed_before_the_rename_leaves_no_shard(tmp_path: Path) -> None:
    store = named(tmp_path)
    fill(store, range(5))
    (shard,) = list_shards(store)
    shutil.copytree(store / "shards" / shard, store / "open" / ("0" * 32))
    (store / "shards" / ("1" * 32)).mkdir()  # and a shard without a sidecar does not exist
    assert list_shards(store) == [shard]
    assert whole(store) == (1, 5)


def test_a_full_disk_is_one_line_and_the_store_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = named(tmp_path)
    fill(store, range(5))

    def full(path: Path, data: bytes) -> None:
        path.write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left on device"):
        fill(store, range(5, 9))
    assert whole(store) == (1, 5)
    assert list((store / "open").iterdir()) == []


def test_interrupted_scoring_keeps_what_was_scored(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        StoreWriter(named(tmp_path), IDENTITY, 999, {}) as writer,
    ):
        writer.add(context(1), values(1), labels(1))
        raise KeyboardInterrupt
    assert len(Store(named(tmp_path))) == 1


def test_two_writers_fill_one_store(tmp_path: Path) -> None:
    store = named(tmp_path)
    first = StoreWriter(store, IDENTITY, 999, {})
    second = StoreWriter(store, IDENTITY, 999, {})
    for number in range(6):
        writer = first if number % 2 else second
        writer.add(context(number), values(number), labels(number))
    first.commit()
    second.commit()
    assert whole(store) == (2, 6)


@pytest.fixture
def scored(
    tmp_path: Path, aligned: Path, rows_file: Path, tokens_file: Path, run: Callable[..., Result]
) -> Path:
    targets = tmp_path / "targets.json"
    result = run(*score_command(aligned, rows_file, tokens_file, tmp_path), "-o", targets)
    assert result.exit_code == 0, result.output
    return targets


def summary(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_a_known_dataset_needs_no_model(
    scored: Path, aligned: Path, rows_file: Path, tokens_file: Path,
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.scoring.fill.make_scorer", None)
    command = score_command(aligned, rows_file, tokens_file, scored.parent)
    again = summary(run(*command, "-o", scored.with_name("again.json"), "--json"))
    assert (again["scored"], again["known"], again["shared"]) == (0, 15, 9)


def test_a_known_dataset_loads_no_heavy_library(
    scored: Path, aligned: Path, rows_file: Path, tokens_file: Path
) -> None:
    command = [*score_command(aligned, rows_file, tokens_file, scored.parent), "-o", scored]
    code = (
        "import sys; from pact_offline.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
        "print({'torch', 'vllm', 'transformers', 'zarr', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "15 known, 0 scored" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
    assert len(TargetCache.open(scored, verify_all=True)) == 12


@pytest.mark.parametrize("what", ["rows", "tokenizer", "truncation"])
def test_what_was_tokenized_before_is_not_trusted_for_other_rows_or_tokenizers(
    what: str, scored: Path, base: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    aligned: Path, run: Callable[..., Result],
) -> None:  # fmt: skip
    model = shutil.copytree(aligned, tmp_path / "model")
    command = [*score_command(model, rows_file, tokens_file, tmp_path), "-o", scored, "--json"]
    assert summary(run(*command))["scored"] == 0  # same weights, same tokens
    if what == "rows":
        rows = rows_file.read_text().splitlines()
        rows_file.write_text("\n".join([rows[0].replace("parcel", "letter"), *rows[1:]]) + "\n")
    elif what == "tokenizer":
        template = model / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    else:
        command += ["--max-tokens", 40]
    assert summary(run(*command))["scored"] > 0


@pytest.mark.parametrize(
    "change",
    [
        ["--batch-tokens", 64],
        ["--shard-steps", 7],
        ["--gpu-memory-utilization", 0.9],
        ["--tensor-parallel-size", 2],
        ["--max-tokens", 400],
        ["--part", "2/5"],
        "renamed rows",
        "moved model",
    ],
)
def test_what_decides_no_value_scores_nothing_again(
    change: Any, scored: Path, aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    model, rows, options = aligned, rows_file, ["-o", scored]
    if change == "renamed rows":
        rows = rows_file.rename(tmp_path / "other name.jsonl")
    elif change == "moved model":
        model = shutil.copytree(aligned, tmp_path / "moved")
    else:
        options = change if change[0] == "--part" else [*options, *change]
    command = score_command(model, rows, tokens_file, tmp_path)
    assert summary(run(*command, *options, "--json"))["scored"] == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_response_that_occurs_often_is_one_context(
    aligned: Path, tokens_file: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Parcel {i}", "response": "Shipping"} for i in range(1000)]
    path = write_rows(tmp_path / "many.jsonl", rows)
    model, settings = locate_model(str(aligned)), ScoreSettings.model_validate({})
    dataset = prepare(model, [path], tokens_file, tmp_path / "cache", settings)
    kinds = [one.kind for one in dataset.contexts(dataset.distinct)]
    assert (kinds.count("full"), kinds.count("response_only")) == (1000, 1)
    assert len(dataset.distinct_keys) == 1001


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_loader_workers_read_what_this_process_reads(scored: Path, start: str) -> None:
    from torch.utils.data import DataLoader

    targets = TargetCache.open(scored)
    expected = [targets[index].full for index in range(12)]  # files are open before the workers are
    loader = DataLoader(
        targets, batch_size=None, num_workers=3, multiprocessing_context=start, shuffle=False
    )
    for index, found in enumerate(loader):
        np.testing.assert_array_equal(np.asarray(found.full), expected[index])


def test_only_new_contexts_are_scored(
    scored: Path, aligned: Path, tokens_file: Path, rows_file: Path, run: Callable[..., Result]
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    new = {"prompt": "A row nobody has seen", "response": "Billing"}
    more = write_rows(scored.with_name("more.jsonl"), [new, *reversed(rows)])
    command = score_command(aligned, more, tokens_file, scored.parent)
    result = summary(run(*command, "-o", scored.with_name("more.json"), "--json"))
    assert result["scored"] == 1  # its response alone is known already
    assert result["known"] == 15


def test_parts_score_everything_once(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    command = score_command(aligned, rows_file, tokens_file, tmp_path)
    counts = [summary(run(*command, "--part", f"{i}/3", "--json"))["scored"] for i in (1, 2, 3)]
    bound = summary(run(*command, "-o", tmp_path / "targets.json", "--json"))
    assert sum(counts) == 15
    assert bound["scored"] == 0
    assert verify_targets(tmp_path / "targets.json").contexts == 15


def test_a_binding_missing_a_context_is_refused(
    scored: Path, aligned: Path, rows_file: Path, tokens_file: Path, run: Callable[..., Result]
) -> None:
    store = next((scored.parent / "cache").iterdir())
    for shard in list_shards(store):
        shutil.rmtree(store / "shards" / shard)
    with pytest.raises(StoreError, match="pact-offline score"):
        TargetCache.open(scored)


def test_a_cache_can_be_moved_with_its_targets(scored: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(scored.parent / "cache", moved / "cache")
    for path in (scored, *scored.parent.glob("targets-*.arrow")):
        shutil.move(path, moved / path.name)
    assert len(TargetCache.open(moved / "targets.json", verify_all=True)) == 12


def test_a_link_to_a_targets_file_leads_to_its_keys_and_store(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "linked.json"
    link.symlink_to(scored)
    assert len(TargetCache.open(link, verify_all=True)) == 12


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a" * 31, "", 3])
def test_no_name_in_targets_becomes_a_path(scored: Path, name: Any) -> None:
    value = json.loads(scored.read_text())
    value["shards"] = [name]
    scored.write_text(json.dumps(value))
    with pytest.raises(StoreError, match="expected a shard id"):
        TargetCache.open(scored)


def test_a_symbolic_link_in_a_shard_is_refused(scored: Path) -> None:
    store = next((scored.parent / "cache").iterdir())
    arrow = next(store.rglob("contexts.arrow"))
    arrow.rename(scored.parent / "outside.arrow")
    arrow.symlink_to(scored.parent / "outside.arrow")
    with pytest.raises(StoreError, match="symbolic link"):
        TargetCache.open(scored, verify_all=True)


def forge(store: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """Change the store's only shard, and make it consistent again, as someone hostile would."""
    (old,) = list_shards(store)
    folder = store / "shards" / old
    sidecar = json.loads((folder / "shard.json").read_text())
    change(folder, sidecar)
    sidecar["files"] = {
        name: sha256_file(folder / name) if (folder / name).is_file() else digest
        for name, digest in sidecar["files"].items()
    }
    data = json.dumps(sidecar).encode()
    (folder / "shard.json").write_bytes(data)
    folder.rename(store / "shards" / shard_id_of(data))


def huge_array(folder: Path, sidecar: dict[str, Any]) -> None:
    path = folder / "log_confidence.zarr" / "zarr.json"
    value = json.loads(path.read_text())
    value["shape"] = value["chunk_grid"]["configuration"]["chunk_shape"] = [10**12, 3]
    path.write_text(json.dumps(value))


def huge_counts(folder: Path, sidecar: dict[str, Any]) -> None:
    huge_array(folder, sidecar)
    sidecar["steps"] = 10**12


def compressed_array(folder: Path, sidecar: dict[str, Any]) -> None:
    path = folder / "log_confidence.zarr" / "zarr.json"
    value = json.loads(path.read_text())
    value["codecs"].append({"name": "gzip", "configuration": {"level": 1}})
    path.write_text(json.dumps(value))


def steps_beyond_the_array(folder: Path, sidecar: dict[str, Any]) -> None:
    table = pa.table([[b"k" * 16], [0], [10**9]], schema=SCHEMA)
    place = str(folder / "contexts.arrow")
    with pa.OSFile(place, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table)
    sidecar["contexts"] = 1


def path_outside(folder: Path, sidecar: dict[str, Any]) -> None:
    sidecar["files"]["../../../../etc/passwd"] = "0" * 64


def compressed_contexts(folder: Path, sidecar: dict[str, Any]) -> None:
    many = 1_000_000
    table = pa.table([[b"k" * 16] * many, [0] * many, [1] * many], schema=SCHEMA)
    (folder / "contexts.arrow").write_bytes(compressed(table))


def hidden_contexts(folder: Path, sidecar: dict[str, Any]) -> None:
    """Compressed, and behind the end of the messages, where only the footer leads."""
    compressed_contexts(folder, sidecar)
    data = (folder / "contexts.arrow").read_bytes()
    batch = 16 + struct.unpack_from("<i", data, 12)[0]  # past magic bytes and schema
    footer = len(data) - 10 - struct.unpack_from("<i", data, len(data) - 10)[0]
    here, later = struct.pack("<q", batch), struct.pack("<q", batch + 8)
    assert data[footer:].count(here) == 1
    moved = data[footer:].replace(here, later)
    ended = data[:batch] + struct.pack("<ii", -1, 0) + data[batch:footer] + moved
    (folder / "contexts.arrow").write_bytes(ended)
    assert len(pa.ipc.open_file(folder / "contexts.arrow").read_all()) == 1_000_000


def compressed(table: pa.Table) -> bytes:
    made, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(made, table.schema, options=options) as writer:
        writer.write_table(table)
    return made.getvalue().to_pybytes()


def dictionary_of(keys: int) -> pa.DictionaryArray:
    values = pa.array([b"k" * 16] * keys, pa.binary(16))
    return pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), values)


def compressed_dictionary(folder: Path, sidecar: dict[str, Any]) -> None:
    table = pa.table({"key": dictionary_of(1_000_000)})
    (folder / "contexts.arrow").write_bytes(compressed(table))


def without_labels(folder: Path, sidecar: dict[str, Any]) -> None:
    """As format 2 had it."""
    shutil.rmtree(folder / "label.zarr")
    sidecar["files"] = {n: d for n, d in sidecar["files"].items() if not n.startswith("label")}


def labels_of_another_dtype(folder: Path, sidecar: dict[str, Any]) -> None:
    path = folder / "label.zarr" / "zarr.json"
    path.write_text(path.read_text().replace('"float16"', '"int16"').replace("0.0", "0"))


def too_few_labels(folder: Path, sidecar: dict[str, Any]) -> None:
    path = folder / "label.zarr" / "c" / "0"
    path.write_bytes(path.read_bytes()[:-2])


def nested_json(folder: Path, sidecar: dict[str, Any]) -> None:
    (folder / "log_confidence.zarr" / "zarr.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (huge_array, "expected float16 .*, found float16 .1000000000000, 3."),
        (huge_counts, "expected 1000000000000 steps, found 20"),
        (compressed_array, "expected float16 .* in one plain chunk"),
        (compressed_contexts, "expected plain columns, found compressed ones"),
        (compressed_dictionary, "expected plain columns, found a dictionary"),
        (hidden_contexts, "expected 5 contexts, found 0"),
        (steps_beyond_the_array, "expected 20 steps, found 1000000000"),
        (without_labels, "files: expected"),
        (labels_of_another_dtype, "expected float16 .* found int16"),
        (too_few_labels, r"label.zarr/c/0: expected \(20,\) float16"),
        (path_outside, "files: expected"),
        (nested_json, "expected a Zarr array"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hostile_store_is_refused_in_words(
    change: Callable[[Path, dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    store = named(tmp_path)
    fill(store, range(5))
    forge(store, change)
    with pytest.raises(StoreError, match=said) as caught:
        Store(store).verify()
    assert "\n" not in str(caught.value)
    assert verify_store(str(store)).bad


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 7},
        {"keys": 3},
        {"keys": "z" * 64},
        {"keys": "../../../etc/passwd"},
        {"keys": "0" * 64},
        {"template": 3},
        {"settings": 3},
        {"settings": {"turns": "first"}},
        {"settings": {"unknown": 1}},
        {"identity": {}},
        {"extra": 1},
        {"store": "nowhere"},
    ],
)
def test_a_damaged_targets_file_is_refused(scored: Path, change: dict) -> None:
    scored.write_text(json.dumps(json.loads(scored.read_text()) | change))
    with pytest.raises(StoreError, match=scored.name) as caught:
        TargetCache.open(scored)
    assert "\n" not in str(caught.value)


def keys_file(targets: Path) -> Path:
    return keys_place(targets, json.loads(targets.read_text())["keys"])


def test_row_keys_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Rows of one turn and of several, of two sources."""
    random = np.random.default_rng(0)
    rows = [[random.bytes(16).hex() for _ in range(count)] for count in (2, 4, 3)]
    made = RowKeys.of(rows)
    scaffolds = np.array([0, 0, 4, 0, 1, 0])
    written = RowKeys(made.keys, made.ends, np.array([0, 0, 1]), np.array([7, 9, 1]), scaffolds)
    targets = tmp_path / "t.json"
    found = RowKeys.load(targets, written.save(targets))
    assert [key.hex() for key in found.keys.to_pylist()] == [*rows[0], *rows[1], *rows[2]]
    assert (found.starts.tolist(), found.ends.tolist()) == ([0, 2, 6], [2, 6, 9])
    assert (found.sources.tolist(), found.places.tolist()) == ([0, 0, 1], [7, 9, 1])
    assert found.data == made.data
    assert (found.turn_ends.tolist(), found.scaffolds.tolist()) == ([1, 4, 6], scaffolds.tolist())
    assert found.first_difference(made) is None
    for other, row in (
        ([rows[0], rows[2], rows[1]], 1),
        ([rows[0] + rows[1][:2], rows[1][2:], rows[2]], 0),  # the same keys, of other rows
        (rows[:2], 2),
        ([*rows, rows[0]], 3),
    ):
        assert found.first_difference(RowKeys.of(other)) == row


@pytest.mark.parametrize("what", ["missing", "changed", "a directory", "unreadable"])
def test_keys_that_are_not_what_was_written_are_one_line(
    what: str, scored: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keys_file(scored)
    data = bytearray(path.read_bytes())
    if what == "changed":
        data[data.index(b"ARROW1", 8) // 2] ^= 1
        path.write_bytes(data)
    elif what == "unreadable":

        def refuse(path: Path) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(row_keys_module, "sha256_file", refuse)
    else:
        path.unlink()
        if what == "a directory":
            path.mkdir()
    said = {
        "missing": "found no such file; move both together, or run `pact-offline score` again",
        "changed": "expected the bytes that were written, found others",
        "a directory": "expected a file, found a directory",
        "unreadable": "cannot be read: Permission denied",
    }
    line = fails("cache", "verify", scored)
    assert str(path) in line
    assert said[what] in line


def key_table(ends: list[int], keys: pa.Array) -> pa.Table:
    """Rows whose keys end at `ends`."""
    lists = pa.LargeListArray.from_arrays(pa.array([0, *ends], pa.int64()), keys)
    zeros = [0] * len(ends)
    scaffolds = [[0] * (end - start - 1) for start, end in pairwise([0, *ends])]
    return pa.table([lists, zeros, zeros, scaffolds], schema=row_keys_module.SCHEMA)


def keys_beside_rows(keys: pa.Array) -> bytes:
    """The last row's end moved from 6 to 5: a writer leaves out what belongs to no row."""
    data = to_bytes(key_table([2, 6], keys))
    here, instead = (struct.pack("<3q", 0, 2, end) for end in (6, 5))
    assert data.count(here) == 1
    return data.replace(here, instead)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda keys: compressed(key_table([2, 4, 6], keys)), "found compressed ones"),
        (
            lambda keys: compressed(pa.table({"keys": dictionary_of(10**6)})),
            "found a dictionary",
        ),
        (
            lambda keys: to_bytes(key_table([2, 4, 6], keys).select(["keys", "source"])),
            "expected the columns keys, source, place, scaffold, found others",
        ),
        (
            lambda keys: to_bytes(
                key_table([2, 4, 6], keys).cast(
                    row_keys_module.SCHEMA.set(2, pa.field("place", pa.int32()))
                )
            ),
            "expected the columns keys, source, place, scaffold, found others",
        ),
        (
            lambda keys: to_bytes(
                key_table([6], keys).set_column(2, "place", pa.array([None], pa.int64()))
            ),
            "expected the columns keys, source, place, scaffold, found others",
        ),
        (lambda keys: to_bytes(key_table([], keys)), "expected the keys of rows, found none"),
        (lambda keys: to_bytes(key_table([2, 3, 6], keys)), "expected two or more of each row"),
        (
            lambda keys: to_bytes(
                key_table([2, 4, 6], keys).set_column(
                    3,
                    row_keys_module.SCHEMA.field("scaffold"),
                    pa.array([[0, 0], [], [0]], pa.large_list(pa.int32())),
                )
            ),
            "scaffold: expected one of each turn",
        ),
        (keys_beside_rows, "expected those of rows, found others beside them"),
        (lambda keys: b"", "expected an Arrow table"),
        (lambda keys: b"[" * 100_000, "expected an Arrow table"),
    ],
    ids=[
        "compressed", "a dictionary", "a column less", "another type", "a null", "no rows",
        "a row of one key", "scaffolds of others", "keys of no row", "empty", "no Arrow",
    ],
)  # fmt: skip
def test_keys_in_another_form_are_refused_in_words(
    make: Callable[[pa.Array], bytes], said: str, tmp_path: Path
) -> None:
    """With the right SHA-256, as someone hostile would."""
    store, targets = named(tmp_path), tmp_path / "t.json"
    fill(store, range(3))
    bind(store, targets, range(3))
    data = make(row_keys(range(3)).keys)
    digest = hashlib.sha256(data).hexdigest()
    keys_place(targets, digest).write_bytes(data)
    targets.write_text(json.dumps(json.loads(targets.read_text()) | {"keys": digest}))
    with pytest.raises(StoreError, match=f"{keys_place(targets, digest)}.*{said}") as caught:
        TargetCache.open(targets)
    assert "\n" not in str(caught.value)


def test_keys_that_a_store_does_not_hold_name_the_row(tmp_path: Path) -> None:
    store, targets = named(tmp_path), tmp_path / "t.json"
    fill(store, range(3))
    keys = [[context(n).key] * 3 for n in range(3)]
    for number, kind in enumerate(("full", "response_only", "response_only")):
        lacking = [keys[0], [*keys[1]], keys[2]]
        lacking[1][number] = context(9).key
        shards = tuple(list_shards(store))
        lost = RowKeys.of(lacking)
        Binding(str(store), IDENTITY, "", "", {}, lost, shards, ({},), {}).save(targets)
        with pytest.raises(LookupError, match=f"row 1: expected its {kind} context"):
            TargetCache.open(targets)


def test_earlier_keys_of_a_targets_file_are_removed_and_others_left(tmp_path: Path) -> None:
    store = named(tmp_path)
    fill(store, range(4))
    places = [tmp_path / name for name in ("t[1].json", "t1.json", "t[1]-b.json", "t.1", "t.2")]
    for place in places:
        bind(store, place, range(3))
    users_own = [tmp_path / f"t[1]-{name}.arrow" for name in ("0123456789ab", "rows")]
    for path in users_own:
        path.write_bytes(b"mine")
    before = {place: keys_file(place) for place in places}
    assert len({*before.values()}) == len(places)
    bind(store, places[0], range(4))
    assert not before[places[0]].exists()
    for place, rows in zip(places, (4, 3, 3, 3, 3), strict=True):
        assert len(TargetCache.open(place)) == rows
    assert [path.read_bytes() for path in users_own] == [b"mine", b"mine"]
    right = {keys_file(place) for place in places} | {*users_own}
    assert {*tmp_path.glob("*.arrow")} == right
    bind(store, places[0], range(4))  # once more the same
    assert {*tmp_path.glob("*.arrow")} == right


def test_keys_that_were_damaged_are_written_again(tmp_path: Path) -> None:
    store, targets = named(tmp_path), tmp_path / "t.json"
    fill(store, range(3))
    bind(store, targets, range(3))
    keys_file(targets).write_bytes(b"")
    bind(store, targets, range(3))
    assert len(TargetCache.open(targets)) == 3


def test_an_older_targets_file_says_to_score_again(
    scored: Path, aligned: Path, rows_file: Path, tokens_file: Path,
    run: Callable[..., Result], fails: Callable[..., str],
) -> None:  # fmt: skip
    value = json.loads(scored.read_text())
    for name in ("template", "settings", "keys"):
        del value[name]
    value["identity"]["format_version"] = 2
    older = {"format_version": 2, "max_tokens": 512, "examples": ["0" * 64] * 12}
    scored.write_text(json.dumps(value | older))
    common = ["--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]
    for command in (
        ["cache", "verify", scored],
        ["cache", "show", scored, 0, *common[4:]],
        ["cache", "audit", scored, *common],
        ["finetune", *common, "--targets", scored, "-o", scored.with_name("adapter")],
    ):
        assert f"{scored}: format_version: expected 4, found 2; run `pact-offline score` again" in (
            fails(*command)
        )
    again = run(*score_command(aligned, rows_file, tokens_file, scored.parent), "-o", scored)
    assert again.exit_code == 0, again.output
    assert len(TargetCache.open(scored)) == 12


def test_an_older_store_says_to_score_again(tmp_path: Path, fails: Callable[..., str]) -> None:
    store = named(tmp_path)
    fill(store, range(3))
    older = Identity(**{**IDENTITY.__dict__, "format_version": 2})
    (store / "identity.json").write_bytes(older.to_bytes())
    said = (
        f"{store}/identity.json: format_version: expected 3, found 2, of another pact-offline; run "
        "`pact-offline score` again"
    )
    for work in (lambda: Store(store), lambda: fill(store, range(3))):
        with pytest.raises(StoreError) as caught:
            work()
        assert str(caught.value) == said
    for command in ("verify", "gc"):
        assert said in fails("cache", command, store)


def rows_of(model: Path, *files: Path, **settings: Any) -> TokenizedRows:
    chosen = ScoreSettings.model_validate(settings)
    return tokenized_by(Chat(load_tokenizer(str(model))), files, chosen)


def test_other_rows_order_or_model_are_refused(
    scored: Path, rows_file: Path, base: Path, aligned: Path, tmp_path: Path
) -> None:
    targets, settings = TargetCache.open(scored), ScoreSettings.model_validate({})
    lines = rows_file.read_text().splitlines(keepends=True)
    targets.check_rows(rows_of(aligned, rows_file), settings)
    targets.check_model(locate_model(str(aligned)))
    other = tmp_path / "other.jsonl"
    other.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(TargetsMismatchError, match=r"other.jsonl:2: expected the row.*rows$"):
        targets.check_rows(rows_of(aligned, other), settings)
    other.write_text("".join(lines[:11]))
    with pytest.raises(TargetsMismatchError, match=r"expected targets of 11 rows, found 12$"):
        targets.check_rows(rows_of(aligned, other), settings)
    with pytest.raises(TargetsMismatchError, match="expected targets of the model"):
        targets.check_model(locate_model(str(base)))
    with pytest.raises(TargetsMismatchError, match="safety ids"):
        targets.check_safety_ids([1, 2], "tokens.json")


def test_other_tokens_by_another_setting_of_the_rows_name_it(
    scored: Path, rows_file: Path, aligned: Path
) -> None:
    """Another value that gives the same tokens is no matter."""
    targets = TargetCache.open(scored)
    rows = rows_of(aligned, rows_file, max_tokens=40)
    assert rows.is_cut.any()
    settings = ScoreSettings.model_validate({"max_tokens": 40})
    said = r"rows.jsonl:\d+: expected the row.*; --max-tokens was 512 then, and is 40$"
    with pytest.raises(TargetsMismatchError, match=said):
        targets.check_rows(rows, settings)
    settings = ScoreSettings.model_validate({"max_tokens": 400, "turns": "last"})
    targets.check_rows(rows_of(aligned, rows_file, max_tokens=400, turns="last"), settings)


def test_another_template_or_other_variables_of_it_are_refused(scored: Path) -> None:
    targets = TargetCache.open(scored)
    template = targets.binding.template
    targets.check_chat(template, {})
    for other in (("0" * 64, {}), (template, {"enable_thinking": False})):
        with pytest.raises(TargetsMismatchError, match="expected targets of the chat template"):
            targets.check_chat(*other)


def plain_pass(model: Any, one: Context, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-confidences and labels of a context by a plain forward pass."""
    import torch

    with torch.no_grad():
        rows = model(torch.tensor(one.ids[None]).long()).logits[0].log_softmax(-1).numpy()
    places = [token for start, end in one.spans for token in range(start, end)]
    own = [rows[place - 1, one.ids[place]] for place in places]
    return np.stack([rows[place - 1, ids] for place in places]), np.array(own)


def test_stored_targets_are_the_reference_models(
    scored: Path, rows_file: Path, aligned: Path
) -> None:
    """Against a plain forward pass over each context, one by one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32).eval()
    targets = TargetCache.open(scored)
    assert targets.binding.identity.stored_dtype == "uint8"
    for index, example in enumerate(rows_of(aligned, rows_file)):
        own = [targets.read_labels([index], kind) for kind in ("full", "response_only")]
        header = targets.binding.identity.header_ids
        contexts = contexts_of(example, header)
        for one, stored, stored_labels in zip(contexts, targets[index], own, strict=True):
            right, right_labels = plain_pass(model, one, targets.safety_ids)
            np.testing.assert_allclose(stored, right, atol=0.05)
            np.testing.assert_allclose(stored_labels, right_labels, atol=0.01)


@pytest.mark.parametrize("stored", ["uint8", "float32"])
def test_the_turns_of_a_row_are_read_in_their_order(
    stored: str, aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """One full context with a span for each turn, and a response-only context for each."""
    import torch
    from transformers import AutoModelForCausalLM

    answers = [["Billing", "Shipping, I think"], ["Shipping, I think", "Billing"], ["Billing"]]
    rows = [conversation(*(("My parcel", answer) for answer in row)) for row in answers]
    path, targets = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "targets.json"
    command = score_command(aligned, path, tokens_file, tmp_path)
    command += ["--stored-dtype", stored, "--shard-steps", 5, "-o", targets, "--json"]
    assert summary(run(*command))["scored"] == 3 + 2  # of five answers two are different
    cache, close = TargetCache.open(targets, verify_all=True), 0.05 if stored == "uint8" else 1e-4
    assert len(cache.binding.shards) > 1
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32).eval()
    right: dict[tuple[str, int], list[np.ndarray]] = {}
    for row, example in enumerate(rows_of(aligned, path)):
        full, *only = contexts_of(example, cache.binding.identity.header_ids)
        turns = len(answers[row])
        assert (full.kind, len(full.spans)) == ("full", turns)
        assert [(one.kind, len(one.spans)) for one in only] == [("response_only", 1)] * turns
        for kind, made in (("full", [full]), ("response_only", only)):
            passes = [plain_pass(model, one, cache.safety_ids) for one in made]
            right[kind, row] = [np.concatenate(part) for part in zip(*passes, strict=True)]
    for kind in CONTEXT_KINDS:
        for some in ([0], [1], [2], [1, 2, 0]):
            found = cache.read(some, kind), cache.read_labels(some, kind)
            for which, stored_ones in enumerate(found):
                expected = np.concatenate([right[kind, row][which] for row in some])
                np.testing.assert_allclose(stored_ones, expected, atol=close)
    one, other = (right["response_only", row][0] for row in (0, 1))
    assert not np.allclose(one, other, atol=10 * close)  # the order shows
    np.testing.assert_array_equal(cache[1].full, cache.read([1], "full"))
    np.testing.assert_array_equal(cache[1].response_only, cache.read([1], "response_only"))
    page = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    for read_by_page, ours in zip(names["read_targets"](targets), cache, strict=True):
        for found, expected in zip(read_by_page, ours, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)

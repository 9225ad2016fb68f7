import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import write_rows
from stores import IDENTITY, context, fill, list_shards, named, read, values, whole

from pact_offline.cache.format import shard_id_of
from pact_offline.cache.identity import Identity
from pact_offline.cache.inspect import verify_store, verify_targets
from pact_offline.cache.store import Store
from pact_offline.cache.targets import TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import ScoringError, StoreError, TargetsMismatchError
from pact_offline.files import sha256_file
from pact_offline.models.locate import locate_model
from pact_offline.rows.chat import tokenize
from pact_offline.rows.contexts import contexts_of
from pact_offline.rows.read import read_rows
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
    assert store.locate([context(99).key, context(2).key]).tolist()[0] == -1


def test_minus_infinity_survives(tmp_path: Path) -> None:
    with StoreWriter(named(tmp_path), IDENTITY, 9, {}) as writer:
        writer.add(context(1), np.full((4, 3), -np.inf, np.float32))
    assert np.isneginf(read(Store(named(tmp_path)), 1)).all()


def test_a_context_of_another_shape_or_with_nan_is_refused(tmp_path: Path) -> None:
    with StoreWriter(named(tmp_path), IDENTITY, 9, {}) as writer:
        with pytest.raises(ScoringError, match=r"expected log-confidences \[4, 3\]"):
            writer.add(context(1), values(1, steps=3))
        with pytest.raises(ScoringError, match="NaN"):
            writer.add(context(1), np.full((4, 3), np.nan, np.float32))
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
        ("format_version", 3),
    ],
)
def test_every_field_changes_the_identity(field: str, value: Any) -> None:
    other = Identity(**{**IDENTITY.__dict__, field: value})
    assert other.digest != IDENTITY.digest


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
        writer.add(context(1), values(1))
        raise KeyboardInterrupt
    assert len(Store(named(tmp_path))) == 1


def test_two_writers_fill_one_store(tmp_path: Path) -> None:
    store = named(tmp_path)
    first = StoreWriter(store, IDENTITY, 999, {})
    second = StoreWriter(store, IDENTITY, 999, {})
    for number in range(6):
        (first if number % 2 else second).add(context(number), values(number))
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


def score_command(model: Path, rows: Path, tokens: Path, folder: Path) -> list[Any]:
    return [
        "score", "--model", model, "--rows", rows, "--safety-tokens", tokens,
        "--cache", folder / "cache", "--backend", "transformers", "--dtype", "float32",
    ]  # fmt: skip


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
    assert len(dataset.keys) == 1001
    assert sum(context.kind == "response_only" for context in dataset.contexts.values()) == 1


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
    shutil.move(scored, moved / "targets.json")
    assert len(TargetCache.open(moved / "targets.json", verify_all=True)) == 12


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
    import pyarrow as pa

    from pact_offline.cache.format import SCHEMA

    table = pa.table([[b"k" * 16], [0], [10**9]], schema=SCHEMA)
    place = str(folder / "contexts.arrow")
    with pa.OSFile(place, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table)
    sidecar["contexts"] = 1


def path_outside(folder: Path, sidecar: dict[str, Any]) -> None:
    sidecar["files"]["../../../../etc/passwd"] = "0" * 64


def compressed_contexts(folder: Path, sidecar: dict[str, Any]) -> None:
    import pyarrow as pa

    from pact_offline.cache.format import SCHEMA

    many = 1_000_000
    table = pa.table([[b"k" * 16] * many, [0] * many, [1] * many], schema=SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    place = str(folder / "contexts.arrow")
    with pa.OSFile(place, "wb") as file, pa.ipc.new_file(file, SCHEMA, options=options) as writer:
        writer.write_table(table)


def nested_json(folder: Path, sidecar: dict[str, Any]) -> None:
    (folder / "log_confidence.zarr" / "zarr.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "change",
    [
        huge_array,
        huge_counts,
        compressed_array,
        compressed_contexts,
        steps_beyond_the_array,
        path_outside,
        nested_json,
    ],
)
def test_a_hostile_store_is_refused_in_words(
    change: Callable[[Path, dict[str, Any]], None], tmp_path: Path
) -> None:
    store = named(tmp_path)
    fill(store, range(5))
    forge(store, change)
    with pytest.raises(StoreError, match="expected") as caught:
        Store(store).verify()
    assert "\n" not in str(caught.value)
    assert verify_store(str(store)).bad


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 7},
        {"examples": [["x", "y"]]},
        {"examples": ["z" * 64]},
        {"examples": 3},
        {"identity": {}},
        {"extra": 1},
        {"store": "nowhere"},
    ],
)
def test_a_damaged_targets_file_is_refused(scored: Path, change: dict) -> None:
    scored.write_text(json.dumps(json.loads(scored.read_text()) | change))
    with pytest.raises(StoreError, match=scored.name):
        TargetCache.open(scored)


def test_other_rows_order_or_model_are_refused(
    scored: Path, rows_file: Path, base: Path, aligned: Path
) -> None:
    from pact_offline.rows.chat import load_tokenizer

    targets = TargetCache.open(scored)
    rows = read_rows(rows_file)
    tokenizer = load_tokenizer(str(aligned))
    examples = tokenize(rows, tokenizer, 512)
    origins = [row.origin for row in rows]
    targets.check_examples(examples, origins)
    targets.check_model(locate_model(str(aligned)))
    with pytest.raises(TargetsMismatchError, match=r"rows.jsonl:1: expected the row"):
        targets.check_examples([examples[1], examples[0], *examples[2:]], origins)
    with pytest.raises(TargetsMismatchError, match="expected targets of 11 rows, found 12"):
        targets.check_examples(examples[:11], origins[:11])
    with pytest.raises(TargetsMismatchError, match="expected targets of the model"):
        targets.check_model(locate_model(str(base)))
    with pytest.raises(TargetsMismatchError, match="safety ids"):
        targets.check_safety_ids([1, 2], "tokens.json")


def test_stored_targets_are_the_reference_models(
    scored: Path, rows_file: Path, aligned: Path
) -> None:
    """Against a plain forward pass over each context, one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    targets = TargetCache.open(scored)
    assert targets.binding.identity.stored_dtype == "uint8"
    examples = tokenize(read_rows(rows_file), tokenizer, 512)
    for index, example in enumerate(examples):
        for one, stored in zip(
            contexts_of(example, targets.binding.identity.header_ids), targets[index], strict=True
        ):
            with torch.no_grad():
                logits = model(torch.tensor(one.ids[None]).long()).logits[0]
            rows = logits[one.response_start - 1 :].log_softmax(-1)[:, targets.safety_ids]
            np.testing.assert_allclose(stored, rows.numpy(), atol=0.05)

"""No command writes over what it reads, and nothing is lost where one is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import Result
from conftest import write_rows

from pact_offline.errors import InputError
from pact_offline.rows.files import values_of
from pact_offline.rows.subset import Subset, write_subsets
from pact_offline.training.checkpoints import checkpoints_held

Fails = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def place(
    tmp_path: Path, aligned: Path, rows_file: Path, tokens_file: Path,
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A folder with a model, rows, tokens, an adapter, and an evaluation."""
    shutil.copytree(aligned, tmp_path / "A")
    rows_file.rename(tmp_path / "rows.jsonl")
    tokens_file.rename(tmp_path / "tokens.json")
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "run.answers.jsonl")
    monkeypatch.chdir(tmp_path)
    trained = run(
        "finetune", "--model", "A", "--rows", "rows.jsonl", "--objective", "none", "--epochs", 1,
        "--dtype", "float32", "-o", "adapter",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    asked = run(
        "evaluate", "--name", "reference", "--model", "A", "--task", "rows.jsonl",
        "--max-new-tokens", 2, "-o", "reference",
    )  # fmt: skip
    assert asked.exit_code == 0, asked.output
    return tmp_path


SCORE = "--model A --rows rows.jsonl --safety-tokens tokens.json --cache cache"
EVALUATE = "evaluate --name run --model A --task rows.jsonl --max-new-tokens 2"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (f"score {SCORE} -o rows.jsonl", "rows.jsonl, which --rows reads"),
        (f"score {SCORE} -o ./tokens.json", "tokens.json, which --safety-tokens reads"),
        ("rehearse --model A --prompts run.answers.jsonl --safety-tokens tokens.json "
         "--cache cache -o run.json", "run.json, which --prompts reads"),
        ("report reference/metrics.json -o reference/metrics.json", "which METRICS... reads"),
        ("report reference/metrics.json -o reference/answers.jsonl", "which METRICS... reads"),
        ("merge --model A --adapter adapter -o adapter", "adapter, which --adapter reads"),
        ("finetune --model A+adapter --rows rows.jsonl --objective none -o adapter",
         "adapter, which --model reads"),
        ("finetune --model A --rows rows.jsonl --objective none --method full -o A",
         "A, which --model reads"),
        (f"{EVALUATE} --reference reference -o reference", "reference, which --reference reads"),
        (f"{EVALUATE} --set more:answer=reference/rows.jsonl -o reference", "which --set reads"),
        (f"{EVALUATE} --rates adapter/more.py:one -o adapter", "adapter, which --rates reads"),
        (f"score {SCORE} --chat-template t.jinja -o t.jinja", "which --chat-template reads"),
    ],
)  # fmt: skip
def test_an_output_that_is_an_input_is_refused(
    command: str, found: str, place: Path, fails: Fails
) -> None:
    shutil.copy(place / "rows.jsonl", place / "reference" / "rows.jsonl")
    (place / "adapter" / "more.py").touch()
    (place / "t.jinja").touch()
    before = tree(place)
    line = fails(*command.split())
    assert "expected a place of its own, found " in line
    assert found in line
    assert tree(place) == before


@pytest.mark.parametrize(
    "command",
    [
        "finetune --model gpt2 --rows no.jsonl --objective none -o gpt2",
        "finetune --model A --rows no+adapter --objective none -o adapter",
        "evaluate --name x --model none --set xstest -o xstest",
        "evaluate --name x --model none --harmful hub:adapter -o adapter",
    ],
)
def test_a_name_that_is_no_path_is_no_input(command: str, place: Path, fails: Fails) -> None:
    assert "place of its own" not in fails(*command.split())


def test_subsets_are_written_all_or_none(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}] * 3)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{"prompt": "a", "response": "b"}] * 3))
    kept = np.array([True, False, True])
    one = tmp_path / "one.jsonl"
    one.write_text("mine")
    with pytest.raises(InputError, match=r"expected a name that ends in \.json"):
        write_subsets([Subset(str(rows), kept, one), Subset(str(array), kept, tmp_path / "x.csv")])
    with pytest.raises(InputError, match="cannot be copied"):
        write_subsets(
            [
                Subset(str(rows), kept, one),
                Subset(str(tmp_path / "no.json"), kept, tmp_path / "y.json"),
            ]
        )
    assert one.read_text() == "mine"
    write_subsets([Subset(str(rows), kept, one), Subset(str(array), kept, tmp_path / "x.json")])
    assert len(one.read_text().splitlines()) == 2
    assert len(json.loads((tmp_path / "x.json").read_text())) == 2


def test_a_line_that_is_a_byte_order_mark_is_one_for_reader_and_writer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 0}', b"\xef\xbb\xbf", b'{"a": 1}', b"", b'{"a": 2}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    values = list(values_of(str(path)))
    assert [value.place for value in values] == [1, 2, 3, 5]
    kept = np.array([value.value != {"a": 1} for value in values])
    write_subsets([Subset(str(path), kept, tmp_path / "kept.jsonl")])
    assert (tmp_path / "kept.jsonl").read_bytes() == b"\n".join([*lines[:2], lines[4]]) + b"\n"


@pytest.mark.parametrize("name", ["rows.arrow", "rows.parquet"])
def test_views_of_strings_are_copied(name: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    texts = [f"Where is parcel number {number}?" for number in range(7)]
    table = pa.table({"prompt": pa.array(texts, pa.string_view()), "number": range(7)})
    path, out = tmp_path / name, tmp_path / f"kept.{name}"
    if name.endswith("parquet"):
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    kept = np.array([True, False, False, True, True, False, True])
    write_subsets([Subset(str(path), kept, out)])
    assert [value.value["number"] for value in values_of(str(out))] == [0, 3, 4, 6]


def test_two_runs_of_one_output_do_not_share_checkpoints(tmp_path: Path) -> None:
    output, folder = tmp_path / "adapter", tmp_path / ".adapter.checkpoints"
    expected = "expected checkpoints of no other run that trains now"
    with checkpoints_held(output, keeps=True):
        with pytest.raises(InputError, match=expected), checkpoints_held(output, keeps=True):
            pass
        with checkpoints_held(output, keeps=False):  # ends, and leaves what another one needs
            pass
        assert folder.exists()
        with checkpoints_held(tmp_path / "another", keeps=True):
            pass
    assert not folder.exists()
    with pytest.raises(KeyError), checkpoints_held(output, keeps=True):
        raise KeyError
    assert folder.exists()  # for the same command to go on from
    with checkpoints_held(output, keeps=False):
        pass
    assert not folder.exists()


def test_a_refused_rehearsal_leaves_the_one_that_is_there(
    place: Path, run: Callable[..., Result], fails: Fails
) -> None:
    command: list[Any] = [
        "rehearse", "--model", "A", "--prompts", "rows.jsonl", "--safety-tokens", "tokens.json",
        "--cache", "cache", "--backend", "transformers", "--dtype", "float32", "-o", "kept.json",
    ]  # fmt: skip
    made = run(*command, "--answer-tokens", 4)
    assert made.exit_code == 0, made.output
    before = tree(place)
    line = fails(*command, "--answer-tokens", 3, "--max-tokens", 4)
    assert "rows.jsonl:1: expected a prompt of less than 4 tokens" in line
    assert "positions" in fails(*command, "--answer-tokens", 100_000)
    assert tree(place) == before


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan"])
def test_no_number_is_no_number(text: str, place: Path, run: Callable[..., Result]) -> None:
    result = run("screen", "t.json", "--safety-tokens", "tokens.json", f"--above={text}")
    assert result.exit_code == 2
    assert "is not a number" in result.stderr

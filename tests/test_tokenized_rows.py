"""Tokenized rows on disk: what is kept, by what it is known again, and what is left out."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_rows
from tiny import TEMPLATE

from pact_offline.errors import InputError, MissingFileError
from pact_offline.models.locate import ModelFiles, locate_model
from pact_offline.rows import tokenized, tokenizing
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.contexts import contexts_of
from pact_offline.rows.read import read_rows
from pact_offline.rows.tokenize import tokenize_all
from pact_offline.rows.tokenized import (
    TokenizedRows,
    joined,
    tokenized_by,
    tokenized_rows,
)
from pact_offline.settings.stages import RowSettings

THOUGHT = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}",
)


def is_known(model: ModelFiles, source: str, settings: RowSettings) -> bool:
    """Whether what a source gave is kept."""
    name = tokenized._name_of(model, source, settings)
    return (tokenized._home() / name / "facts.json").is_file()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokenized rows are kept, empty."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "pact-offline-rows"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Conversations of one to three answers, on every other line."""
    turns = [
        [{"role": "user", "content": f"Where is parcel {i}?"},
         {"role": "assistant", "content": f"Shipping{', I think' * (i % 4)}"}]
        for i in range(9)
    ]  # fmt: skip
    lines = [json.dumps({"messages": [*chain(*turns[i : i + 1 + i % 3])]}) for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"\n{line}\n" for line in lines))
    return path


class Reader:
    """Reads rows by a model, and counts how often its tokenizer was opened."""

    def __init__(self, model: Path) -> None:
        self.folder, self.opened = model, 0

    @property
    def model(self) -> ModelFiles:
        return locate_model(str(self.folder))

    def __call__(self, *sources: Path | str, **settings: Any) -> TokenizedRows:
        chosen = RowSettings(**settings)

        def load_chat() -> Chat:
            self.opened += 1
            return chat_of(str(self.folder), chosen)

        return tokenized_rows(self.model, sources, chosen, load_chat)


@pytest.fixture
def read(aligned: Path) -> Reader:
    return Reader(aligned)


def content(found: TokenizedRows) -> list[Any]:
    return [(row.ids.tolist(), row.turns, row.is_cut) for row in found]


def keys(found: TokenizedRows) -> list[str]:
    return [key.hex() for key in found.keys.to_pylist()]


def kept(home: Path) -> list[Path]:
    return sorted(home.iterdir()) if home.exists() else []


# What is in them


@pytest.mark.parametrize(
    "settings", [{}, {"turns": "last"}, {"scaffold": "response"}, {"max_tokens": 50}]
)
def test_rows_are_what_the_tokenizer_makes_of_the_file(
    settings: dict, read: Reader, rows: Path, aligned: Path, tmp_path: Path
) -> None:
    (tmp_path / "thought.jinja").write_text(THOUGHT)
    settings = {**settings, "chat_template": str(tmp_path / "thought.jinja")}
    found, chosen = read(rows, **settings), RowSettings(**settings)
    chat = chat_of(str(aligned), chosen)
    examples = tokenize_all(read_rows(rows), chat, chosen)
    assert content(found) == [(e.ids.tolist(), e.turns, e.is_cut) for e in examples]
    contexts = [contexts_of(example, chat.header_ids) for example in examples]
    assert keys(found) == [context.key for some in contexts for context in some]
    assert found.key_ends.tolist() == np.cumsum([len(some) for some in contexts]).tolist()
    assert [key.hex() for key in found.full_keys.to_pylist()] == [c[0].key for c in contexts]
    assert found.lengths.tolist() == [len(e.ids) for e in examples]
    assert found.steps.tolist() == [e.steps for e in examples]
    assert found.turns.tolist() == [len(e.turns) for e in examples]
    assert found.is_cut.tolist() == [e.is_cut for e in examples]
    turns = [turn for example in examples for turn in example.turns]
    assert found.answer_lengths.tolist() == [turn.end - turn.header for turn in turns]
    assert found.longest_turn == max(turn.end - turn.first for turn in turns)
    facts = found.facts[0]
    assert (facts.read, facts.bad, facts.long) == (9, 0, 0)
    assert facts.header_ids == chat.header_ids
    assert (facts.tokenizer, facts.template) == (chat.fingerprint, chat.template_sha256)


def test_a_row_has_the_line_it_stands_on(read: Reader, rows: Path) -> None:
    found = read(rows)
    assert found.places.tolist() == [2 * i + 2 for i in range(9)]
    assert [found.origin(i) for i in (0, 8)] == [f"{rows}:2", f"{rows}:18"]


def test_rows_that_are_known_are_read_from_the_disk_as_they_are_needed(
    read: Reader, tmp_path: Path, rows: Path
) -> None:
    line = rows.read_text().strip().splitlines()[-1]
    many = tmp_path / "many.jsonl"
    many.write_text(f"{line}\n" * 2000)
    read(many)
    before = pa.total_allocated_bytes()
    found = read(many)
    size = found.files[0].stat().st_size
    assert size > 300_000
    assert pa.total_allocated_bytes() - before < size / 20
    ids = found[1999].ids
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_any_kind_of_file_is_tokenized_alike(read: Reader, rows: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    values = [json.loads(line) for line in rows.read_text().split("\n") if line]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert keys(found) == keys(read(rows))
    assert found.digest() == read(rows).digest()
    assert found.places.tolist() == [*range(1, 10)]


def test_rows_of_several_sources_stand_one_after_the_other(
    read: Reader, rows: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "Hi", "response": "Billing"}] * 2)
    found = read(other, rows, other)
    assert len(found) == 13
    assert content(found) == content(read(other)) + content(read(rows)) + content(read(other))
    assert found.sources.tolist() == [0] * 2 + [1] * 9 + [2] * 2
    assert [found.origin(i) for i in (1, 2, 12)] == [f"{other}:2", f"{rows}:2", f"{other}:2"]
    assert [facts.source for facts in found.facts] == [str(s) for s in (other, rows, other)]
    assert keys(found)[:4] == keys(found)[-4:]
    assert found.key_ends[-1] == len(found.keys)
    assert len(joined([])) == 0


def test_the_digest_is_of_all_that_is_trained(read: Reader, rows: Path, tmp_path: Path) -> None:
    other = shutil.copy(rows, tmp_path / "other.jsonl")
    alike = {read(rows).digest(), read(other).digest()}
    assert len(alike) == 1
    assert len(alike | {read(rows, turns="last").digest(), read(rows, other).digest()}) == 3


# What is known again


def test_a_known_file_opens_no_tokenizer_whatever_it_is_called(
    read: Reader, rows: Path, tmp_path: Path
) -> None:
    assert not is_known(read.model, str(rows), RowSettings())
    first = read(rows)
    assert read.opened == 1
    assert is_known(read.model, str(rows), RowSettings())
    moved = rows.rename(tmp_path / "moved.jsonl")
    again = read(moved)
    assert read.opened == 1
    assert content(again) == content(first)
    assert again.origin(0) == f"{moved}:2"
    assert again.facts[0].source == str(moved)


def test_another_process_knows_the_file_too(read: Reader, rows: Path, aligned: Path) -> None:
    read(rows)
    script = f"""
        from pact_offline.models.locate import locate_model
        from pact_offline.rows.tokenized import tokenized_rows
        from pact_offline.settings.stages import RowSettings

        rows = tokenized_rows(locate_model({str(aligned)!r}), [{str(rows)!r}], RowSettings(), None)
        print(rows.digest())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == read(rows).digest()


@pytest.mark.parametrize(
    "settings",
    [
        {"turns": "last"},
        {"scaffold": "response"},
        {"max_tokens": 100},
        {"long_rows": "cut"},
        {"bad_rows": "drop"},
        {"columns": {"messages": "messages"}},
        {"chat_template_kwargs": {"quiet": True}},
    ],
)
def test_other_settings_are_tokenized_anew(settings: dict, read: Reader, rows: Path) -> None:
    read(rows)
    read(rows, **settings)
    assert read.opened == 2
    read(rows)
    read(rows, **settings)
    assert read.opened == 2


def test_other_bytes_are_tokenized_anew(read: Reader, rows: Path) -> None:
    first, text = read(rows), rows.read_text()
    rows.write_text(text.replace("parcel 8", "parcel 9"))
    assert content(read(rows)) != content(first)
    assert read.opened == 2
    rows.write_text(text)
    assert content(read(rows)) == content(first)
    assert read.opened == 2


def test_what_a_name_says_of_the_kind_of_file_counts(read: Reader, tmp_path: Path) -> None:
    """The same bytes, of which commas make two columns and tabs make none."""
    table = tmp_path / "rows.csv"
    table.write_text("prompt,response\nHi,Billing\n")
    assert len(read(table)) == 1
    with pytest.raises(InputError, match=r"rows\.tsv:2: expected a known form"):
        read(table.rename(tmp_path / "rows.tsv"))


def test_another_template_or_tokenizer_is_tokenized_anew(
    read: Reader, rows: Path, aligned: Path, tmp_path: Path
) -> None:
    read.folder = shutil.copytree(aligned, tmp_path / "model")
    first = read(rows)
    template = tmp_path / "own.jinja"
    template.write_text(THOUGHT)
    own = read(rows, chat_template=str(template))
    assert (read.opened, keys(own) == keys(first)) == (2, False)
    template.write_text(TEMPLATE)
    assert keys(read(rows, chat_template=str(template))) == keys(first)
    assert read.opened == 3
    file = next(read.folder.glob("*.jinja"))
    file.write_text(THOUGHT)
    assert keys(read(rows)) == keys(own)
    assert read.opened == 4


def test_other_weights_change_nothing(read: Reader, rows: Path, base: Path, tmp_path: Path) -> None:
    model = read.folder = shutil.copytree(read.folder, tmp_path / "model")
    read(rows)
    shutil.copy(base / "model.safetensors", model / "model.safetensors")
    read(rows)
    assert read.opened == 1


@pytest.mark.parametrize("damage", ["no rows", "half", "nothing", "no facts", "other facts", "all"])
def test_what_is_kept_and_broken_is_made_anew(
    damage: str, read: Reader, rows: Path, home: Path
) -> None:
    first = content(read(rows))
    (folder,) = kept(home)
    file, facts = folder / "rows.arrow", folder / "facts.json"
    if damage == "no rows":
        file.unlink()
    elif damage in ("half", "nothing"):
        size = 0 if damage == "nothing" else file.stat().st_size // 2
        file.write_bytes(file.read_bytes()[:size])
    elif damage == "no facts":
        facts.unlink()
    elif damage == "other facts":
        facts.write_text('{"source": "x"}')
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert content(read(rows)) == first
    assert read.opened == 2
    assert content(read(rows)) == first
    assert read.opened == 2
    assert kept(home) == [folder]


def test_rows_of_a_dataset_are_read_each_time(
    read: Reader, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells whether the hub still has the same."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "ds").mkdir()
    write_rows(tmp_path / "ds" / "train.jsonl", [{"prompt": "Hi", "response": "Billing"}])
    source = f"hub:{tmp_path}/ds"
    assert content(read(source)) == content(read(source))
    assert read.opened == 2
    assert kept(home) == []
    assert read(source).origin(0) == f"{source}:1"


# Where they are kept


def test_rows_are_kept_where_datasets_keeps_its_own(
    read: Reader, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "HF_DATASETS_CACHE": tmp_path / "one",
        "HF_HOME": tmp_path / "two" / "datasets",
        "XDG_CACHE_HOME": tmp_path / "three" / "huggingface" / "datasets",
    }
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "one"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "two"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    for number, (name, place) in enumerate(places.items(), start=1):
        found = read(rows)
        assert found.files[0].parents[1] == place / "pact-offline-rows"
        assert read.opened == number
        monkeypatch.delenv(name)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_a_place_that_cannot_be_written_to_costs_time_alone(
    read: Reader, rows: Path, tmp_path: Path, home: Path, temporary: Path
) -> None:
    home.parent.write_text("a file")
    found = read(rows)
    assert keys(found) == keys(read(rows))
    assert read.opened == 2
    assert not is_known(read.model, str(rows), RowSettings())
    assert all(file.is_relative_to(temporary) for file in found.files)
    assert content(found)[0][0]


def test_rows_by_a_chat_at_hand_are_not_kept(
    rows: Path, aligned: Path, home: Path, temporary: Path, read: Reader
) -> None:
    chat = chat_of(str(aligned), RowSettings())
    found = tokenized_by(chat, [rows, rows], RowSettings())
    assert len(found) == 18
    assert all(file.is_relative_to(temporary) for file in found.files)
    assert kept(home) == []
    assert keys(found)[: len(found.keys) // 2] == keys(read(rows))
    del chat, found
    files = [*temporary.rglob("rows.arrow")]
    assert len(files) == 2  # data-loader workers and `datasets` open them again
    code = textwrap.dedent(
        f"""
        from pact_offline.rows.chat import chat_of
        from pact_offline.rows.tokenized import tokenized_by
        from pact_offline.settings.stages import RowSettings
        chat = chat_of({str(aligned)!r}, RowSettings())
        print(tokenized_by(chat, [{str(rows)!r}], RowSettings()).files[0])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).parent.exists()  # they go with their process


def test_the_least_used_are_removed_first(
    read: Reader, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"Where is {name}?", "response": "b"}])
        for name in "abcd"
    ]
    for age, file in zip((90, 60, 30), files, strict=False):
        before = {*kept(home)}
        read(file)
        (folder,) = {*kept(home)} - before
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    read(files[0])  # now the last that was used
    size = read(files[0]).files[0].stat().st_size
    monkeypatch.setattr(tokenized, "_KEPT_BYTES", int(2.5 * size))
    read(files[3])
    known = [is_known(read.model, str(file), RowSettings()) for file in files]
    assert known == [True, False, False, True]
    monkeypatch.setattr(tokenized, "_KEPT_BYTES", 1)
    assert len(read(files[1])) == 1  # one that alone is too much stays
    assert len(kept(home)) == 1


# Several at once


def test_who_comes_second_takes_what_the_first_has_kept(
    read: Reader, rows: Path, home: Path
) -> None:
    settings, first = RowSettings(), []

    def load_chat() -> Chat:  # while this one works, the other begins and ends
        first.extend([read(rows), kept(home)[0].stat().st_ino])
        return chat_of(str(read.folder), settings)

    found = tokenized_rows(read.model, [rows], settings, load_chat)
    assert content(found) == content(first[0])
    (folder,) = kept(home)
    assert folder.stat().st_ino == first[1]


def test_two_processes_at_once_both_get_the_rows(rows: Path, aligned: Path, home: Path) -> None:
    model, settings = locate_model(str(aligned)), RowSettings()
    chat = chat_of(str(aligned), settings)
    fork = multiprocessing.get_context("fork")
    together, digests = fork.Barrier(3), fork.SimpleQueue()

    def load_chat() -> Chat:
        together.wait(60)
        return chat

    def work() -> None:
        digests.put(tokenized_rows(model, [rows], settings, load_chat).digest())

    processes = [fork.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {digests.get() for _ in processes} == {tokenized_by(chat, [rows], settings).digest()}
    assert len(kept(home)) == 1  # and nothing beside it


@pytest.fixture
def in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are as many as else a million: they go to other processes."""
    monkeypatch.setattr(tokenizing, "_AT_ONCE", 3)
    monkeypatch.setattr(tokenizing, "_ALONE", 2)
    monkeypatch.setattr(tokenizing, "_BATCHES_KEPT", 4)
    monkeypatch.setattr(tokenizing, "usable_cores", lambda: 2)


def many_rows(path: Path) -> Path:
    """A hundred rows, of which some are bad, too long or of several answers."""
    values: list[Any] = [
        {"prompt": f"Where is parcel {i}?", "response": f"Billing{' please' * (i % 5)}", "id": i}
        for i in range(100)
    ]
    for i in range(0, 100, 10):
        values[i] = {"prompt": f"Lost {i}"}
        values[i + 5] = {"prompt": f"Where is parcel {i}? " * 60, "response": "Long"}
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"No {i}"}]
        values[i + 6] = {"messages": said * 3}
    return write_rows(path, values)


DROP = {"bad_rows": "drop", "long_rows": "drop"}


def test_many_rows_are_tokenized_by_other_processes_alike(
    tmp_path: Path, aligned: Path, request: pytest.FixtureRequest
) -> None:
    path, chat = many_rows(tmp_path / "rows.jsonl"), chat_of(str(aligned), RowSettings())
    alone = tokenized_by(chat, [path], RowSettings(**DROP))
    request.getfixturevalue("in_small_chunks")
    spread = tokenized_by(chat, [path], RowSettings(**DROP))
    assert len(spread) == 80
    assert content(spread) == content(alone)
    assert keys(spread) == keys(alone)
    assert spread.digest() == alone.digest()
    assert spread.places.tolist() == alone.places.tolist()
    assert [spread.origin(i) for i in range(80)] == [alone.origin(i) for i in range(80)]
    assert spread.facts == alone.facts


@pytest.mark.usefixtures("in_small_chunks")
def test_what_is_wrong_late_in_a_source_is_told_as_elsewhere(tmp_path: Path, aligned: Path) -> None:
    path, chat = many_rows(tmp_path / "rows.jsonl"), chat_of(str(aligned), RowSettings())
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*; 20 of 100 rows cannot be used"):
        tokenized_by(chat, [path], RowSettings())
    packed = tmp_path / "rows.jsonl.gz"
    lines = "".join(
        json.dumps({"prompt": os.urandom(99).hex(), "response": "Yes"}) + "\n" for _ in range(999)
    )
    with pa.CompressedOutputStream(str(packed), "gzip") as file:
        file.write(lines.encode())
    packed.write_bytes(packed.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz: cannot be read: "):
        tokenized_by(chat, [packed], RowSettings())


@pytest.mark.usefixtures("in_small_chunks")
def test_who_stops_early_waits_for_nothing(tmp_path: Path, aligned: Path) -> None:
    rows = [{"prompt": f"Where is parcel {i}?", "response": "Billing"} for i in range(300)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    chat = chat_of(str(aligned), RowSettings())
    chunks = tokenizing._chunks(tokenizing._Work(str(path), RowSettings(), chat))
    for _ in range(5):
        next(chunks)
    stopping = Thread(target=chunks.close, daemon=True)
    stopping.start()
    stopping.join(60)
    assert not stopping.is_alive()


# What is left out


def three(tmp_path: Path) -> Path:
    """A row, a bad one, and one whose prompt alone is too long."""
    rows = [{"prompt": "Hi", "response": "Billing"}, {"prompt": "Hi"},
            {"prompt": "Where? " * 60, "response": "Shipping"}]  # fmt: skip
    return write_rows(tmp_path / "three.jsonl", rows)


def test_bad_and_long_rows_are_refused_all_at_once(
    read: Reader, tmp_path: Path, home: Path
) -> None:
    path = three(tmp_path)
    with pytest.raises(InputError) as found:
        read(path, max_tokens=100)
    assert str(found.value).startswith(f"{path}:2: response or completion: expected a response")
    assert str(found.value).endswith(
        "; 2 of 3 rows cannot be used; --bad-rows drop goes on without them"
    )
    assert kept(home) == []  # neither whole nor half


def test_a_long_row_alone_says_what_can_be_done(read: Reader, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Where? " * 60, "response": "a"}])
    with pytest.raises(
        InputError,
        match=r"rows\.jsonl:1: expected a response within 100 tokens, found a prompt of \d+; raise "
        "--max-tokens, shorten the row, or set --long-rows$",
    ):
        read(path, max_tokens=100)


@pytest.mark.parametrize(
    ("settings", "places", "told"),
    [
        ({"bad_rows": "drop"}, [1], "2 that cannot be used of 3 rows"),
        (DROP, [1], "1 that cannot be used and 1 with no response within 100 of 3 rows"),
        ({"bad_rows": "drop", "long_rows": "cut"}, [1, 3], "1 that cannot be used of 3 rows"),
    ],
)
def test_rows_that_are_left_out_are_counted_and_named_each_time(
    settings: dict, places: list[int], told: str, read: Reader, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = three(tmp_path)
    for number in range(2):
        caplog.clear()
        if number:  # when they are known, under a new name
            path = path.rename(tmp_path / "moved.jsonl")
        found = read(path, max_tokens=100, **settings)
        assert found.places.tolist() == places
        *named, last = caplog.messages
        assert last == f"{path}: left out: {told}"
        left_out = sorted({2, 3} - {*places})
        assert [line.split(": ")[0] for line in named] == [f"{path}:{i}" for i in left_out]
    assert read.opened == 1


def test_a_prompt_that_is_cut_leaves_room_for_the_answer(read: Reader, tmp_path: Path) -> None:
    found = read(three(tmp_path), max_tokens=100, bad_rows="drop", long_rows="cut")
    assert found.is_cut.tolist() == [False, True]
    assert found.lengths.tolist()[1] == 100
    whole = read(three(tmp_path), max_tokens=512, bad_rows="drop")
    assert found[1].ids.tolist() == whole[1].ids[-100:].tolist()
    assert found.steps.tolist() == whole.steps.tolist()


@pytest.mark.parametrize("settings", [{"bad_rows": "drop"}, DROP])
def test_no_row_left_is_refused_each_time(settings: dict, read: Reader, tmp_path: Path) -> None:
    long = {"prompt": "Where? " * 60, "response": "Shipping"}
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, long])
    for _ in range(2):
        with pytest.raises(InputError, match=r"expected rows to train, found none: .* of 2 rows$"):
            read(path, max_tokens=100, **settings)
    assert read.opened == 1


def test_a_row_that_the_template_refuses_is_a_bad_row(read: Reader, tmp_path: Path) -> None:
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + TEMPLATE
    )
    rows = [{"prompt": "Hi", "response": "Billing"}] * 2
    path = write_rows(tmp_path / "rows.jsonl", [rows[0], {**rows[0], "system": "S"}, rows[1]])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*found: no system here \(--system"):
        read(path, chat_template=str(template))
    found = read(path, chat_template=str(template), bad_rows="drop")
    assert found.places.tolist() == [1, 3]


def test_a_source_that_is_not_there_is_named(read: Reader, tmp_path: Path, rows: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.jsonl: no such file"):
        read(rows, tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="expected a file, found a directory"):
        read(tmp_path)
    with pytest.raises(MissingFileError, match=r"gone\.jinja: no such file"):
        read(rows, chat_template=str(tmp_path / "gone.jinja"))


def test_what_nothing_reads_is_told_each_time(
    read: Reader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = [{"role": "user", "content": "Hi", "name": "Ada"},
            {"role": "assistant", "content": "Billing", "thinking": "Hm"}]  # fmt: skip
    rows = [{"messages": said, "tools": [{"name": "look"}], "id": 7}, {"messages": said[:2]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        caplog.clear()
        read(path)
        (line,) = caplog.messages
        assert line.startswith(f"{path}: keys that nothing reads: ")
        assert {*line.partition("reads: ")[2].split(", ")} == {
            "id (1 rows)",
            "tools (1 rows)",
            "messages[].name (2 rows)",
            "messages[].thinking (2 rows)",
        }
    template = tmp_path / "tools.jinja"
    template.write_text(
        TEMPLATE + "{% if tools %}{{ tools[0]['name'] }}{% endif %}{# name, thinking #}"
    )
    caplog.clear()
    read(path, chat_template=str(template))
    # Named, but not written.
    line = "keys that nothing reads: id (1 rows), messages[].thinking (2 rows)"
    assert caplog.messages == [f"{path}: {line}"]


def test_nothing_is_told_of_rows_with_which_nothing_is_wrong(
    read: Reader, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(rows)
    assert caplog.messages == []


def test_a_command_says_what_it_left_out(
    tmp_path: Path, aligned: Path, run: Callable[..., Any]
) -> None:
    rows = [{"prompt": "Hi", "response": "Billing"}, {"prompt": "Hi"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["finetune", "--model", aligned, "--rows", path, "--objective", "none"]
    words += ["--batch-size", 1, "--dtype", "float32", "--bad-rows", "drop"]
    result = run(*words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"{path}: left out: 1 that cannot be used of 2 rows" in result.stderr


@pytest.mark.usefixtures("in_small_chunks")
def test_a_process_that_is_killed_is_told(
    monkeypatch: pytest.MonkeyPatch, aligned: Path, rows_file: Path
) -> None:
    """As where memory runs out: no command waits for it forever."""
    monkeypatch.setattr(
        "pact_offline.rows.tokenizing._begin", lambda work: os.kill(os.getpid(), signal.SIGKILL)
    )
    settings = RowSettings()
    with pytest.raises(InputError, match="a process that tokenized it was killed"):
        tokenized_by(chat_of(str(aligned), settings), [rows_file], settings)


def test_the_processes_of_one_that_is_killed_end(tmp_path: Path, aligned: Path) -> None:
    code = textwrap.dedent(
        f"""
        import multiprocessing, os, signal, threading, time
        from pact_offline.rows import tokenizing
        from pact_offline.rows.chat import chat_of
        from pact_offline.rows.tokenized import tokenized_by
        from pact_offline.settings.stages import RowSettings

        def killed():
            while len(multiprocessing.active_children()) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        def slow(work, values):
            time.sleep(60)

        tokenizing._AT_ONCE, tokenizing._ALONE, tokenizing._LOOKS_EVERY = 2, 0, 0.05
        tokenizing.usable_cores = lambda: 2
        tokenizing._Work.__call__ = slow
        threading.Thread(target=killed).start()
        chat = chat_of({str(aligned)!r}, RowSettings())
        tokenized_by(chat, [{str(many_rows(tmp_path / "rows.jsonl"))!r}], RowSettings())
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2
    for _ in range(600):
        left = [pid for pid in left if Path(f"/proc/{pid}").exists() and not _is_dead(pid)]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def _is_dead(pid: int) -> bool:
    """Whether a process has ended, and only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True

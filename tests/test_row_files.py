"""The files that rows stand in, whatever wrote them, and what is said of those that are broken."""

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_rows

from pact_offline.errors import InputError, MissingFileError
from pact_offline.rows.files import suffix_of, values_of
from pact_offline.rows.read import read_all_rows, read_rows
from pact_offline.rows.subset import Subset, write_subsets

# A line separator and its kin, which end no line of JSON or CSV; and text of many alphabets.
ODD = "one\u2028two\u2029three\u0085four\x0bfive 日本 🙂 \u00e9e\u0301"
ROWS = [
    {"prompt": "Where is my parcel?", "response": "Shipping"},
    {"prompt": ODD, "response": f"  {ODD}\n\n"},
    {"prompt": 'He said "no, thanks"', "response": "Returns,\nI think"},
]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table_of(path: Path, rows: list[Any], **options: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)


def arrow_of(path: Path, rows: list[Any], kind: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with kind(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "lines.jsonl": lambda path, rows: path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    ),
    "array.json": lambda path, rows: path.write_text(
        json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8"
    ),
    "table.csv": table_of,
    "table.tsv": lambda path, rows: table_of(path, rows, delimiter="\t"),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "file.arrow": lambda path, rows: arrow_of(path, rows, pa.ipc.new_file),
    "stream.arrow": lambda path, rows: arrow_of(path, rows, pa.ipc.new_stream),
}


def packed(path: Path, kind: str, suffix: str) -> Path:
    """A file beside another, with the same in it, compressed."""
    to = path.with_name(path.name + suffix)
    with pa.CompressedOutputStream(str(to), kind) as file:
        file.write(path.read_bytes())
    return to


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: Path) -> list[tuple[str, str | None]]:
    return [(row.question, row.response) for row in read_rows(path)]


def told(source: str | Path, **options: Any) -> str:
    """Why a source is refused, in one line that begins with its name."""
    with pytest.raises((InputError, MissingFileError)) as found:
        read_rows(source, **options)
    line = str(found.value)
    assert line.splitlines() == [line]
    assert line.startswith(f"{source}:")
    return line.removeprefix(f"{source}:").strip()


EXPECTED = [(row["prompt"], row["response"]) for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("kind", "suffix"), [("", ""), ("gzip", ".gz"), ("zstd", ".zst"), ("gzip", ""), ("zstd", "")]
)
def test_every_kind_of_file_reads_the_same(
    name: str, kind: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    if kind:
        path = packed(path, kind, suffix or ".x")
        path = path.rename(path.with_name(name + suffix))  # also where its name does not tell
    assert read(path) == EXPECTED


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_has_its_line_or_its_number(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    lines = {"array.json": (2, 6, 10), "table.csv": (2, 3, 6), "table.tsv": (2, 3, 6)}
    found = [row.origin for row in read_rows(tmp_path / name)]
    assert found == [f"{tmp_path / name}:{line}" for line in lines.get(name, (1, 2, 3))]


def test_parquet_rows_read_like_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"Parcel {i}", "response": "Yes" * i} for i in range(1, 3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "table.csv", "table.tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    written(path, b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == EXPECTED
    assert read(packed(path, "gzip", ".gz")) == EXPECTED


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    lines = JSON_LINES.replace("\n", "\r\n")
    path = written(tmp_path / "rows.jsonl", "\r\n" + lines + "\r\n  \r\n")
    assert read(path) == EXPECTED
    assert [row.origin.rpartition(":")[2] for row in read_rows(path)] == ["2", "3", "4"]
    array = json.dumps(ROWS, indent=1).replace("\n", "\r\n")
    assert read(written(tmp_path / "rows.json", array)) == EXPECTED
    table_of(tmp_path / "rows.csv", ROWS, lineterminator="\r\n")
    assert read(tmp_path / "rows.csv") == EXPECTED


def test_a_last_line_needs_no_end(tmp_path: Path) -> None:
    assert read(written(tmp_path / "rows.jsonl", JSON_LINES.rstrip())) == EXPECTED
    table = "prompt,response\nHi,Yes"
    assert read(written(tmp_path / "rows.csv", table)) == [("Hi", "Yes")]


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "table.csv", "rows.parquet"])
def test_a_row_may_have_a_million_characters(name: str, tmp_path: Path) -> None:
    long = "Where is it? \u00e9" * 75_000
    rows = [{"prompt": "Hi", "response": "Yes"}, {"prompt": long, "response": long}, ROWS[0]]
    WRITERS[name](tmp_path / name, rows)
    for path in (tmp_path / name, packed(tmp_path / name, "gzip", ".gz")):
        assert read(path)[1:] == [(long, long), EXPECTED[0]]


def test_packed_files_one_after_the_other_are_one(tmp_path: Path) -> None:
    """As several processes write them, or `cat`."""
    parts = [gzip.compress(line.encode()) for line in JSON_LINES.splitlines(keepends=True)[:1] * 3]
    assert read(written(tmp_path / "rows.jsonl.gz", b"".join(parts))) == EXPECTED[:1] * 3


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_packed_file_cut_in_half_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": os.urandom(40).hex(), "response": "Yes"} for _ in range(200)]
    WRITERS[name](tmp_path / name, rows)
    path = packed(tmp_path / name, kind, ".packed")
    path = path.rename(tmp_path / f"{name}.gz")
    written(path, path.read_bytes()[: path.stat().st_size // 2])
    assert told(path).startswith("cannot be read: ")
    assert told(path, bad_rows="drop").startswith("cannot be read: ")


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_a_binary_file_cut_in_half_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS * 100)
    written(path, path.read_bytes()[: path.stat().st_size // 2])
    assert told(path).startswith("cannot be read: ")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("rows.jsonl", ".jsonl"), ("rows.CSV", ".csv"), ("rows.csv.gz", ".csv"),
        ("a.b.tsv.ZST", ".tsv"), ("rows.gz", ""), ("rows", ""),
    ],
)  # fmt: skip
def test_a_name_says_how_a_file_is_read_whatever_it_is_packed_in(name: str, suffix: str) -> None:
    assert suffix_of(Path(name)) == suffix


# CSV


def test_a_table_may_have_other_columns_and_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "id,prompt,response\n\n7,Hi,Yes\n\n8,Oh,No\n")
    assert [(row.question, row.unread) for row in read_rows(path)] == [
        ("Hi", ("id",)),
        ("Oh", ("id",)),
    ]
    assert [value.place for value in values_of(str(path))] == [3, 5]


@pytest.mark.parametrize("blank", [",", ";", '"",', ",,,"])
def test_delimiters_alone_are_a_blank_line(blank: str, tmp_path: Path) -> None:
    """As spreadsheets leave them below a table; also where some of its rows are written."""
    delimiter = ";" if ";" in blank else ","
    lines = [delimiter.join(cells) for cells in (("prompt", "response"), ("Hi", "Yes"))]
    text = "\n".join([*lines, blank, delimiter.join(("Oh", "No")), blank, blank, ""])
    path = written(tmp_path / "rows.csv", text)
    assert read(path) == [("Hi", "Yes"), ("Oh", "No")]
    assert [row.question for row in read_rows(path, needs_response=False)] == ["Hi", "Oh"]
    write_subsets([Subset(str(path), np.array([False, True]), tmp_path / "some.csv")])
    assert read(tmp_path / "some.csv") == [("Oh", "No")]
    alone = written(tmp_path / "alone.csv", f"{lines[0]}\n{blank}\n")
    assert told(alone) == "expected rows below the header, found none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,label\nHi,1\n", "2: response or completion: expected a response, found none among "
                                 "the keys prompt, label"),
        ("text,label\nHi,1\n", "2: expected a known form"),
        ("prompt,response\nHi\n", "2: expected 2 cells, found 1"),
        ('prompt,response\n"a\nb",c\nHi,Yes,No\n', "4: expected 2 cells, found 3"),
        ("prompt,prompt,response\nHi,Oh,Yes\n", "1: expected distinct columns, found 'prompt' "
                                                "twice"),
        ('prompt,response\nHi,"Yes\n', "2: expected CSV, found: unexpected end of data"),
        ('prompt,response\nHi,"Yes"!\n', "2: expected CSV, found: ',' expected after '\"'"),
        ("prompt,response\n", "expected rows below the header, found none"),
        ("\ufeffprompt,response\n\n\n", "expected rows below the header, found none"),
        ("\n", "expected rows, found none"),
        ('{"prompt": "Hi"}\n', "1: expected CSV, as its name says, found JSON; name it .jsonl or"),
        ('\ufeff[\n {"prompt": "Hi"}\n]', "1: expected CSV, as its name says, found JSON"),
        ("[]", "1: expected CSV, as its name says, found JSON"),
        (b"prompt,response\nHi,Yes\nHi,\xff\n", "3: expected UTF-8 text, found the byte 0xff;"),
        (b"prompt,r\xe9ponse\nHi,Yes\n", "1: expected UTF-8 text, found the byte 0xe9; save it"),
    ],
)  # fmt: skip
def test_a_broken_table_is_named(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert told(written(tmp_path / "rows.csv", text)).startswith(expected)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_as_excel_writes_it_is_read(delimiter: str, end: str, tmp_path: Path) -> None:
    """In many languages a comma stands in numbers, and a semicolon between cells."""
    table_of(tmp_path / "rows.csv", ROWS, delimiter=delimiter, lineterminator=end)
    assert read(tmp_path / "rows.csv") == EXPECTED
    written(tmp_path / "rows.csv", b"\xef\xbb\xbf" + (tmp_path / "rows.csv").read_bytes())
    assert read(packed(tmp_path / "rows.csv", "gzip", ".gz")) == EXPECTED
    kept = np.array([True, False, True])
    write_subsets([Subset(str(tmp_path / "rows.csv"), kept, tmp_path / "some.csv")])
    assert read(tmp_path / "some.csv") == [EXPECTED[0], EXPECTED[2]]


def test_a_line_of_a_table_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", b"prompt,response\nHi,Yes\nOh,\xfc\nHo,No\n")
    assert [row.question for row in read_rows(path, bad_rows="drop")] == ["Hi", "Ho"]


def test_a_header_in_brackets_is_one(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "[prompt],{response}\nHi,Yes\n")
    columns = {"prompt": "[prompt]", "response": "{response}"}
    assert [row.question for row in read_rows(path, columns=columns)] == ["Hi"]


def test_lines_of_a_table_with_other_cells_are_bad_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "prompt,response\nHi,Yes\nOh\nHo,No\na,b,c\n")
    assert [(row.question) for row in read_rows(path, bad_rows="drop")] == ["Hi", "Ho"]
    assert "2 of 4 rows cannot be used" in told(path)


# Parquet and Arrow


def test_nested_columns_become_messages_and_tools(tmp_path: Path) -> None:
    """A column has one type: what one row's call has, every other has with null."""
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": {"city": "X"}}}
    other = {"id": "2", "type": "function", "function": {"name": "b", "arguments": {"day": 3}}}
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {"city": {"type": "s"}}}},
        {"type": "function", "function": {"name": "b", "parameters": {"day": {"type": "i"}}}},
    ]
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
         "tools": tools},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [other]},
                      {"role": "tool", "content": "3", "tool_call_id": "2"},
                      {**said, "weight": 1}], "tools": None},
        {"messages": [asked, {**said, "weight": 0}, asked, said]},
    ]  # fmt: skip
    write_rows(tmp_path / "lines.jsonl", rows)
    expected = [
        (row.messages, row.tools, row.not_trained, row.unread)
        for row in read_rows(tmp_path / "lines.jsonl")
    ]
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        WRITERS[name](tmp_path / name, rows)
        found = read_rows(tmp_path / name)
        assert [(row.messages, row.tools, row.not_trained, row.unread) for row in found] == expected


def test_columns_reach_into_nested_columns(tmp_path: Path) -> None:
    rows = [{"data": {"q": "Hi", "more": "x"}, "a": "Yes"}, {"data": {"q": "Oh"}, "a": "No"},
            {"data": {"q": "Ho", "more": None}, "a": "Well"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = {"instruction": "data.q", "input": "data.more", "output": "a"}
    found = read_rows(tmp_path / "rows.parquet", columns=columns)
    assert [(row.question, row.response) for row in found] == [
        ("Hi x", "Yes"), ("Oh", "No"), ("Ho", "Well"),
    ]  # fmt: skip


def test_a_column_of_bytes_is_no_text(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "response": b"Yes"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert told(tmp_path / "rows.parquet") == (
        "1: response: expected text or a list of messages, found bytes"
    )


# Bad files and bad rows


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "no such file"),
        ("directory", "expected a file, found a directory"),
        ("pipe", "expected a file, found a pipe or a device"),
        ("nothing", "expected rows, found none"),
        ("empty", "expected rows, found none"),
        ("empty array", "expected rows, found none"),
        ("binary", "1: expected UTF-8 text, found byte 0 invalid"),
        ("no parquet", "1: expected UTF-8 text, found byte 0 invalid"),
        ("no arrow", "cannot be read: "),
        ("no gzip", "cannot be read: "),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, kind: str, expected: str) -> None:
    names = {"no parquet": "rows.parquet", "no arrow": "rows.arrow", "no gzip": "rows.jsonl.gz"}
    path = tmp_path / names.get(kind, "rows.jsonl")
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        data = {"nothing": b"", "empty": b"\n", "empty array": b" [ ]\n", "no gzip": b"\x1f\x8b{"}
        written(path, data.get(kind, b"\xff\xff\x00"))
    assert told(path).startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected a JSON object, found: Expecting property name"),
        ("Hi", "expected a JSON object, found: Expecting value at column 1"),
        ('{"prompt": "Hi"} {}', "expected a JSON object, found: Extra data at column 18"),
        ("[1]", 'expected an object, as in {"messages": […]}, found list'),
        ("3", "expected an object, found int"),
        ("null", "expected an object, found NoneType"),
        ("{}", "expected a known form"),
        ('{"prompt": " "}', "expected a prompt, found none"),
        ('{"prompt": "Hi"}', "response or completion: expected a response, found none"),
        ('{"prompt": "a", "response": "\\ud800"}', "response: expected Unicode text"),
        ('{"prompt": ' + "[" * 100_000, "expected a row, found deeply nested JSON"),
        ('{"id": ' + "1" * 5000 + "}", "expected JSON, found a number of too many digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    good = '{"prompt": "Hi", "response": "Yes"}\n'
    path = written(tmp_path / "rows.jsonl", f"{good}\n{line}\n{good}")
    assert told(path).startswith(f"3: {expected}")
    assert len(read_rows(path, bad_rows="drop")) == 2


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (JSON_LINES.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"PK\x03\x04" + bytes(30), "a ZIP file, as .xlsx is too; unpack it, or export it as CSV"),
        (lzma.compress(JSON_LINES.encode()), "a file packed by xz; unpack it"),
        (bz2.compress(JSON_LINES.encode()), "a file packed by bzip2; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
         "a pointer of Git LFS; git lfs pull fetches the file"),
        (b"<!DOCTYPE html>\n<html>", "a web page; download the file itself"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow"])
def test_a_file_of_another_kind_is_named(
    data: bytes, expected: str, name: str, tmp_path: Path
) -> None:
    assert told(written(tmp_path / name, data)).startswith(f"expected rows, found {expected}")


def test_rows_over_several_lines_are_told_where_they_belong(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", json.dumps(ROWS[0], indent=1))
    assert "; a row stands on one line, or all in a JSON array" in told(path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}]
    path = written(tmp_path / "rows.jsonl", f"{json.dumps(turns)}\n{json.dumps(turns)}\n")
    assert told(path).endswith('a list in each line is no row, {"messages": [...]} is')


def test_a_line_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    lines = JSON_LINES.encode().splitlines(keepends=True)
    path = written(tmp_path / "rows.jsonl", lines[0] + b'{"prompt": "\xe9"}\n' + lines[0])
    assert told(path) == "2: expected UTF-8 text, found byte 12 invalid"
    assert len(read_rows(path, bad_rows="drop")) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n {"prompt": "Hi"},\n 3\n]', "2: response or completion: expected a response"),
        ('[\n {"prompt": "Hi",\n  "response": }\n]', "3: expected JSON, found: Expecting value at "
                                                     "column 15"),
        ('[\n{"prompt": "Hi", "response": "Yes"}\n', "3: expected the end of a JSON array, found "
                                                     "otherwise"),
        ('[\n{"prompt": "Hi", "response": "Yes"}\n{}]', "3: expected the end of a JSON array"),
        ('[\n{"prompt": "Hi", "response": "Yes"},\n', "3: expected the end of a JSON array"),
        ('[{"prompt": "Hi", "response": "Yes"}]\n\n{}', "1: expected the end of a JSON array"),
        ("[" * 100_000, "1: expected a row, found deeply nested JSON"),
        ("[" + "1" * 5000 + "]", "1: expected JSON, found a number of too many digits"),
        (b'["\xff"]', "expected UTF-8 text, found byte 2 invalid"),
    ],
)  # fmt: skip
def test_a_broken_array_is_named(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert told(written(tmp_path / "rows.json", text)).startswith(expected)


def some_bad(path: Path, good: int, bad: int) -> Path:
    """Rows, of which the last cannot be used."""
    rows = [{"prompt": f"Parcel {i}", "response": "Yes"} for i in range(good)]
    return write_rows(path, [*rows, *({"prompt": f"Lost {i}"} for i in range(bad))])


def test_one_bad_row_is_named_alone(tmp_path: Path) -> None:
    found = told(some_bad(tmp_path / "rows.jsonl", 3, 1))
    assert found.startswith("4: response or completion: expected a response, found none")
    assert "rows cannot be used" not in found


def test_all_bad_rows_are_counted_and_the_first_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = some_bad(tmp_path / "rows.jsonl", 3, 30)
    found = told(path)
    assert found.startswith("4: response or completion")
    assert "30 of 33 rows cannot be used, the first 20 are named above" in found
    assert found.endswith("; --bad-rows drop goes on without them")
    named = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in named] == [f"{path}:{i}" for i in range(4, 24)]
    caplog.clear()
    assert len(read_rows(path, bad_rows="drop")) == 3
    assert caplog.records[-1].getMessage() == (
        f"{path}: 30 of 33 rows cannot be used, the first 20 are named above, and are left out"
    )
    assert len(caplog.records) == 21


def test_no_row_that_can_be_used_is_refused_either_way(tmp_path: Path) -> None:
    path = some_bad(tmp_path / "rows.jsonl", 0, 2)
    assert "; 2 of 2 rows cannot be used; --bad-rows drop" in told(path)
    assert told(path, bad_rows="drop") == (
        "expected rows that can be used, found none: 2 of 2 rows cannot be used"
    )


def test_keys_that_nothing_reads_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Hi", "response": "Yes", "id": i} for i in range(3)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "from": "shop"}])
    read_rows(path)
    assert caplog.messages == [f"{path}: keys that nothing reads: id (4 rows), from (1 rows)"]


def test_prompts_need_no_answer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, {"prompt": "Oh"}])
    assert [row.question for row in read_rows(path, needs_response=False)] == ["Hi", "Oh"]


def test_rows_of_several_sources_stand_one_after_the_other(tmp_path: Path) -> None:
    for name in ("lines.jsonl", "table.csv", "rows.parquet"):
        WRITERS[name](tmp_path / name, ROWS)
    sources = [tmp_path / name for name in ("table.csv", "rows.parquet", "lines.jsonl")]
    found = read_all_rows(sources)
    assert [(row.question, row.response) for row in found] == EXPECTED * 3
    assert [Path(row.origin.rpartition(":")[0]) for row in found[::3]] == sources


# Datasets of the hub's layout

CONFIGS = """---
configs:
- config_name: shop
  data_files:
  - split: train
    path: data/shop.jsonl
  - split: test
    path: data/late.jsonl
- config_name: bank
  data_files: data/bank.jsonl
---
Questions to a shop and to a bank.
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders as of the hub: one with configurations, one with splits alone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for name in ("ds/data", "plain"):
        (tmp_path / name).mkdir(parents=True)
    written(tmp_path / "ds" / "README.md", CONFIGS)
    for name in ("ds/data/shop", "ds/data/late", "ds/data/bank", "plain/train", "plain/test"):
        rows = [{"prompt": f"{name} {i}", "response": "Yes", "topic": None} for i in range(2)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("hub:./ds:shop", "ds/data/shop"),
        ("hub:./ds:shop:train", "ds/data/shop"),
        ("hub:./ds:shop:test", "ds/data/late"),
        ("hub:./ds:bank", "ds/data/bank"),
        ("hub:./plain", "plain/train"),
        ("hub:./plain:test", "plain/test"),
        ("hub:./plain:default:test", "plain/test"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_dataset_is_read_by_configuration_and_split(source: str, file: str) -> None:
    found = read_rows(source)
    assert [row.question for row in found] == [f"{file} 0", f"{file} 1"]
    assert [row.origin for row in found] == [f"{source}:1", f"{source}:2"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hub:./ds", "pick one among the available configs: ['shop', 'bank']"),
        ("hub:./ds:farm", "pick one among the available configs: ['shop', 'bank']"),
        ("hub:./ds:farm:train", "'farm' not found. Available: ['shop', 'bank']"),
        ("hub:./ds:shop:late", "Unknown split \"late\". Should be one of ['train', 'test']."),
        ("hub:./plain:late", "Unknown split \"late\". Should be one of ['train', 'test']."),
        ("hub:./gone", "no such folder"),
        ("hub:", "expected hub:NAME[:CONFIG[:SPLIT]][@REVISION], found otherwise"),
        ("hub:./ds:", "expected hub:NAME[:CONFIG[:SPLIT]][@REVISION], found otherwise"),
        ("hub:./ds:a:b:c", "expected hub:NAME[:CONFIG[:SPLIT]][@REVISION], found otherwise"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_dataset_that_is_not_there_is_told_with_those_that_are(
    source: str, expected: str
) -> None:
    found = told(source)
    assert found.endswith(expected)
    assert "load_dataset(" not in found  # nobody here writes Python


def test_rows_of_a_dataset_are_checked_like_a_files(hub: Path) -> None:
    rows = [{"prompt": "Hi", "response": "Yes"}, {"prompt": "Oh", "response": None}]
    for split in ("train", "test"):
        write_rows(hub / "plain" / f"{split}.jsonl", rows)
    assert told("hub:./plain").startswith("2: response or completion: expected a response")
    assert len(read_rows("hub:./plain", bad_rows="drop")) == 1


def test_a_broken_file_of_a_dataset_is_told(hub: Path) -> None:
    written(hub / "plain" / "train.jsonl", "{")
    found = told("hub:./plain")
    assert found.startswith("cannot be read as a dataset: ")
    assert "JSON parse error" in found

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import write_rows
from tiny import make_tokenizer

from pact_offline.errors import InputError, MissingFileError, ModelError
from pact_offline.rows.chat import header_ids, load_tokenizer, render, tokenize
from pact_offline.rows.contexts import contexts_of
from pact_offline.rows.read import parse_row, read_rows

MESSAGES = [{"role": "user", "content": "Is it here?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": MESSAGES},
        {"prompt": "Is it here?", "response": "Yes."},
        {"instruction": "Is it here?", "input": "", "output": "Yes."},
        {"instruction": "Is it", "input": "here?", "output": "Yes."},
    ],
)
def test_every_form_of_row_reads_the_same(value: dict) -> None:
    row = parse_row(value, "rows.jsonl:1")
    assert row.prompt == ({"role": "user", "content": "Is it here?"},)
    assert row.response == "Yes."


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected a JSON object, found"),
        ("[1]", "expected an object, found list"),
        ("{}", "expected the key messages, prompt or instruction, found no key"),
        ('{"prompt": 3}', "prompt: expected text, found int"),
        ('{"prompt": " "}', "expected a prompt, found none"),
        ('{"prompt": "Hi"}', "response: expected a response, found none"),
        ('{"prompt": "Hi", "response": ""}', "response: expected a response, found none"),
        ('{"prompt": "Hi", "response": 4}', "response: expected text, found int"),
        ('{"messages": []}', "messages: expected a list of messages"),
        ('{"messages": [3]}', r"messages\[0\]: expected role and content"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\].content: expected text"),
        (
            '{"messages": [{"role": "user", "content": "Hi"}]}',
            "messages: expected a response, found none",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "Hi", "response": "Yes"}}\n\n{line}\n')
    with pytest.raises(InputError, match=f"rows.jsonl:3: {expected}"):
        read_rows(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "binary", "no parquet"])
def test_a_bad_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("rows.parquet" if kind == "no parquet" else "rows.jsonl")
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_text("\n")
    elif kind != "missing":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises((InputError, MissingFileError), match=path.name):
        read_rows(path)


def test_parquet_rows_read_like_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "response": "Yes"}, {"prompt": "Oh", "response": "No"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", rows)
    found = [(row.prompt, row.response) for row in read_rows(tmp_path / "rows.parquet")]
    assert found == [(row.prompt, row.response) for row in read_rows(tmp_path / "rows.jsonl")]


def test_examples_split_where_the_response_starts(rows_file: Path) -> None:
    tokenizer = make_tokenizer()
    row = read_rows(rows_file)[0]
    example = tokenize([row], tokenizer, 512)[0]
    prompt = render(tokenizer, row.prompt, generation_prompt=True)
    assert example.ids[: example.response_start].tolist() == prompt
    assert tokenizer.decode(example.ids[example.response_start :]) == "Billing<|im_end|>\n"


def test_contexts_leave_out_the_last_token_and_read_every_step(rows_file: Path) -> None:
    tokenizer = make_tokenizer()
    example = tokenize(read_rows(rows_file), tokenizer, 512)[1]
    header = header_ids(tokenizer)
    full, response_only = contexts_of(example, header)
    assert tokenizer.decode(header) == "<|im_start|>assistant\n"
    assert full.ids.tolist() == example.ids[:-1].tolist()
    assert response_only.ids.tolist() == header + example.ids[example.response_start : -1].tolist()
    assert full.steps == response_only.steps == example.steps


def test_a_row_is_cut_and_refused_when_nothing_is_left(rows_file: Path) -> None:
    tokenizer = make_tokenizer()
    rows = read_rows(rows_file)
    whole = tokenize(rows[2:3], tokenizer, 512)[0]
    cut = tokenize(rows[2:3], tokenizer, whole.response_start + 2)[0]
    assert cut.steps == 2
    with pytest.raises(InputError, match=r"rows.jsonl:3: expected a response within"):
        tokenize(rows[2:3], tokenizer, whole.response_start)


def test_keys_depend_on_kind_ids_and_start_alone(rows_file: Path) -> None:
    tokenizer = make_tokenizer()
    example = tokenize(read_rows(rows_file), tokenizer, 512)[0]
    full, only = contexts_of(example, header_ids(tokenizer))
    again = type(full)("full", np.array(full.ids.tolist(), dtype=np.int64), full.response_start)
    assert again.key == full.key
    changed = full.ids.copy()
    changed[0] += 1
    others = [
        type(full)("response_only", full.ids, full.response_start),
        type(full)("full", full.ids, full.response_start - 1),
        type(full)("full", changed, full.response_start),
        only,
    ]
    assert full.key not in {other.key for other in others}
    assert len({other.key for other in others}) == 4


def test_a_tokenizer_without_a_chat_template_is_refused(
    aligned: Path, tmp_path: Path, rows_file: Path, tokens_file: Path, fails: Callable[..., str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in aligned.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="chat template"):
        header_ids(load_tokenizer(str(bare)))
    line = fails(
        "score", "--model", bare, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", tmp_path / "targets.json",
    )  # fmt: skip
    assert "expected a tokenizer with a chat template, found none" in line
    assert not (tmp_path / "targets.json").exists()


def test_a_date_in_the_template_is_no_days(aligned: Path, tmp_path: Path) -> None:
    """Else a context would be another one tomorrow, and never be known again."""
    tokenizer = load_tokenizer(str(aligned))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    ids = render(tokenizer, [{"role": "user", "content": "Hello"}], generation_prompt=True)
    assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_a_conversation_that_the_template_refuses_is_named(aligned: Path, rows_file: Path) -> None:
    tokenizer = load_tokenizer(str(aligned))
    tokenizer.chat_template = "{{ raise_exception('no such role here') }}"
    with pytest.raises(InputError, match=r"rows.jsonl:1: expected a conversation .* no such role"):
        tokenize(read_rows(rows_file), tokenizer, 512)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "response": "\\ud800"}', ":1: response: expected Unicode text"),
        ('{"prompt": ' + "[" * 100_000, ":1: expected a row, found deeply nested JSON"),
        ('{"id": ' + "1" * 5000 + "}", ":1: expected JSON, found a number of too many digits"),
    ],
)
def test_odd_text_is_refused_in_words(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=expected):
        read_rows(path)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    assert [row.response for row in read_rows(path)] == ["b"]

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from pact_offline.cli import cli


def commands(group: click.Group = cli, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        path = (*prefix, name)
        found += commands(command, path) if isinstance(command, click.Group) else [path]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_is_a_sentence_and_an_example(
    command: tuple[str, ...], run: Callable[..., Result]
) -> None:
    text = run(*command, "--help").output
    assert f"Example: pact-offline {' '.join(command)}" in " ".join(text.split())


@pytest.fixture
def score(aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path) -> list[Any]:
    return [
        "score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", tmp_path / "targets.json",
        "--backend", "transformers",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--rows", "."], ".: expected a file, found a directory"),
        (["--model", "./nowhere"], "./nowhere: no such model directory"),
        (["--model", "."], ".: expected a model directory with config.json"),
        (["--safety-tokens", "nowhere.json"], "nowhere.json: no such file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--max-tokens", "1"], "max_tokens: expected greater than or equal to 2, found 1"),
        (["--gpu-memory-utilization", "7"], "gpu_memory_utilization: expected less than or equal"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    given: list[str], expected: str, score: list[Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    assert expected in fails(*score, *given)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys and values, found nothing"),
        ("- 1", "expected keys and values, found list"),
        ("dtype: [", "settings.yaml: line"),
        ("typo: 1", "typo: unknown key"),
        ("dtype: float8", "dtype: expected 'float32', 'bfloat16' or 'float16', found \"float8\""),
        ("max_tokens: many", "max_tokens: expected a valid integer"),
        ("shard_steps: 0", "shard_steps: expected greater than or equal to 1, found 0"),
    ],
)
def test_bad_settings_are_named(
    text: str, expected: str, score: list[Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    line = fails(*score, "--config", tmp_path / "settings.yaml")
    assert "settings.yaml" in line
    assert expected in line
    assert not (tmp_path / "targets.json").exists()


def test_options_win_over_the_settings_file(
    score: list[Any], run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text("dtype: float32\nmax_tokens: 99\n")
    config = ["--config", tmp_path / "settings.yaml"]
    assert run(*score, *config, "--max-tokens", 88).exit_code == 0
    targets = json.loads((tmp_path / "targets.json").read_text())
    assert targets["max_tokens"] == 88
    assert targets["identity"]["compute_dtype"] == "float32"


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_bad_part_is_refused(part: str, score: list[Any], run: Callable[..., Result]) -> None:
    result = run(*score, f"--part={part}")
    assert result.exit_code == 2
    assert "expected I/N" in result.output


def test_verbose_shows_the_traceback(score: list[Any], run: Callable[..., Result]) -> None:
    with pytest.raises(FileNotFoundError):
        run("-v", *score, "--rows", "nowhere.jsonl")


def test_tokens_command_prints_a_table(
    aligned: Path, base: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    result = run(
        "tokens", "--aligned", aligned, "--base", base, "--refusals", rows_file,
        "-o", tmp_path / "tokens.json", "--top-k", 7,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 8
    assert len(json.loads((tmp_path / "tokens.json").read_text())["tokens"]) == 7

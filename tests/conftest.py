"""Tiny models, rows and safety tokens that many tests share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch loads: threads that wait by spinning slow a shared machine down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file
from tiny import make_model

from pact_offline.cli import cli
from pact_offline.rows.tokenizer import load_tokenizer, tokenizer_fingerprint
from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session", autouse=True)
def no_memory_of_earlier_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checksums and tokenized rows that this user's cache remembers stay out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture(scope="session")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "aligned", seed=1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", seed=2)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score_command(model: Path, rows: Path, tokens: Path, folder: Path) -> list[Any]:
    return [
        "score", "--model", model, "--rows", rows, "--safety-tokens", tokens,
        "--cache", folder / "cache", "--backend", "transformers", "--dtype", "float32",
    ]  # fmt: skip


def adapters_are_equal(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twelve rows; the responses of every third are equal."""
    answers = ["Billing", "Shipping, I think", f"Returns{' please' * 9}"]
    return write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"My parcel number {i}", "response": answers[i % 3]} for i in range(12)],
    )


@pytest.fixture
def tokens_file(tmp_path: Path, aligned: Path) -> Path:
    """Six safety tokens, one of weight 0."""
    tokenizer = load_tokenizer(str(aligned))
    directions = {5: 0.5, 40: -0.3, 77: 0.2, 200: 0.6, 260: 0.1, 299: 0.4}
    path = tmp_path / "safety_tokens.json"
    SafetyTokens(
        tuple(
            SafetyToken(i, tokenizer.decode([i]), direction, 0.1, 0.05)
            for i, direction in directions.items()
        ),
        tokenizer_fingerprint(tokenizer),
    ).save(path)
    return path


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""

    def invoke(*args: Any) -> Result:
        words = [str(arg) for arg in args]
        if words[0] == "evaluate" and "--backend" not in words:
            words[1:1] = ["--backend", "transformers"]  # an engine takes ten seconds to start
        return CliRunner().invoke(cli, words, catch_exceptions=False)

    return invoke


def in_two_processes(*words: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--master-port", str(port), "-m", "pact_offline", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def targets(
    tmp_path: Path, aligned: Path, rows_file: Path, tokens_file: Path, run: Callable[..., Result]
) -> Path:
    path = tmp_path / "targets.json"
    command = score_command(aligned, rows_file, tokens_file, tmp_path)
    result = run(*command, "--stored-dtype", "float32", "-o", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def command(aligned: Path, rows_file: Path, tokens_file: Path, targets: Path) -> list[Any]:
    return [
        "finetune", "--model", aligned, "--rows", rows_file, "--targets", targets,
        "--safety-tokens", tokens_file, "--dtype", "float32", "--batch-size", 4,
        "--learning-rate", "1e-3", "--lora-dropout", 0, "--objective", "pact",
    ]  # fmt: skip


@pytest.fixture
def conversations(rows_file: Path) -> Path:
    """The twelve rows, with one to three answers each, one of them not to be learnt."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    said = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows
    ]
    said[4][1]["weight"] = 0
    messages = [
        [turn for i in range(1 + number % 3) for turn in said[(number + i) % 12]]
        for number in range(12)
    ]
    messages[4] = [*said[4], *said[5]]
    write_rows(rows_file, [{"messages": turns} for turns in messages])
    return rows_file


@pytest.fixture
def fails(run: Callable[..., Result]) -> Callable[..., str]:
    """Run the command line, hold it to exit code 2 and one line, and give that line."""

    def invoke(*args: Any) -> str:
        result = run(*args)
        lines = [line for line in result.stderr.splitlines() if line.startswith("pact-offline:")]
        assert result.exit_code == 2, result.output
        assert len(lines) == 1, result.stderr
        assert "Traceback" not in result.output
        return lines[0]

    return invoke


FACTS = pytest.StashKey[list[str]]()


@pytest.fixture
def fact(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say something at the end of the test run."""
    return request.config.stash.setdefault(FACTS, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if facts := config.stash.get(FACTS, []):
        terminalreporter.section("faults made on purpose, and what was measured")
        for line in facts:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines last: they leave threads in this process, which tests that fork would deadlock on."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)

"""`pact-offline bench`: every table is made, on tiny models; the numbers are no claim.

Of each command one run is in a process of its own, as for a user; but not of training.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import write_rows

from pact_offline.bench.train import by_itself
from pact_offline.errors import MeasurementError

Run = Callable[..., Result]


class InThisProcess:
    """Stands in for three processes whose imports take longer than all else here."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *args: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def first_in_its_own() -> Callable[..., Any]:
    """Pools of which the first is a real one."""
    pools = iter([ProcessPoolExecutor])
    return lambda *args: next(pools, InThisProcess)(*args)


@pytest.fixture
def common(aligned: Path, rows_file: Path, tokens_file: Path) -> list[Any]:
    return ["--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]


@pytest.fixture
def score(common: list[Any], tmp_path: Path, run: Run) -> Callable[..., Path]:
    def made(name: str, *options: Any) -> Path:
        result = run(
            "score", *common, "--cache", tmp_path / "cache", "--backend", "transformers",
            "--dtype", "float32", "-o", tmp_path / name, *options,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return made


def test_bench_train_compares_the_ways(
    common: list[Any], score: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.bench.train.ProcessPoolExecutor", InThisProcess)
    result = run(
        "bench", "train", *common, "--targets", score("t.json"), "--batch-size", 4, "--steps", 3,
        "--repeats", 1, "--published-steps", 1, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["way"] for one in found["speeds"]] == ["plain", "cache", "live", "published"]
    assert all(one["rows_per_second"] > 0 for one in found["speeds"])
    assert found["speeds"][0]["speed_ratio"] == 1


def test_bench_cache_compares_encodings(
    common: list[Any], score: Callable[..., Path], run: Run, fails: Callable[..., str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    exact, coarse = score("exact.json", "--stored-dtype", "float32"), score("coarse.json")
    bench = ["bench", "cache", "--steps", 3200, *common[4:]]
    result = run(*bench, "--targets", exact, "--policy", coarse, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    sizes = {(one["encoding"], one["compression"]): one for one in found["sizes"]}
    plain = {name: one["bytes_per_step"] for (name, how), one in sizes.items() if how == "plain"}
    assert plain["uint8"] < plain["float16"] < plain["float32"]
    assert sizes["float32", "plain"]["pact_change"] == 0
    assert [one["steps"] for one in found["reading"]] == [3200, 3200]
    assert "stored as float32" in fails(*bench, "--targets", coarse, "--policy", coarse)
    row = write_rows(tmp_path / "row.jsonl", [{"prompt": "One more", "response": "Sales"}])
    more = score("more.json", "--rows", row)
    line = fails(*bench, "--targets", exact, "--policy", more)
    assert f"{more}: expected the rows of {exact}, found others" in line
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    assert "install pact-offline[bench]" in fails(*bench, "--targets", exact, "--policy", coarse)


def test_bench_score_compares_backends(
    common: list[Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.bench.train.ProcessPoolExecutor", first_in_its_own())
    monkeypatch.setattr("pact_offline.bench.score.find_spec", lambda name: None)  # no engine starts
    result = run("bench", "score", *common, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["way"] for one in found["speeds"]] == ["transformers", "script"]
    assert (found["rows"], found["contexts"]) == (12, 15)


def dies(way: str) -> None:
    os._exit(9)


def test_a_measurement_whose_process_is_killed_is_a_line() -> None:
    with pytest.raises(MeasurementError, match="vllm: expected a process that ends by itself"):
        by_itself(dies, "vllm", spawn=True)

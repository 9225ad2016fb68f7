import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pact_offline.cli import cli
from pact_offline.cli.options import settings_options
from pact_offline.machine import allowed_cores, usable_cores
from pact_offline.scoring.transformers import TransformersScorer
from pact_offline.settings.stages import FinetuneSettings


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


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "score",
            "--rows ROWS Rows: JSON lines, a JSON array, CSV, Parquet or Arrow, also .gz or .zst",
        ),
        (
            "score",
            "may be repeated. Each row has messages, or conversations; or prompt and response",
        ),
        ("score", "--compile / --no-compile"),
        (
            "evaluate",
            "--harmful ROWS Held-out harmful prompts: JSON lines, a JSON array, CSV, Parquet",
        ),
        ("finetune", "--lora-modules NAME,... Modules that get an adapter, by the ends of their"),
        ("finetune", "--gate / --no-gate"),
    ],
)
def test_help_says_what_an_option_takes(
    command: str, said: str, run: Callable[..., Result]
) -> None:
    assert said in " ".join(run(command, "--help").output.split())


def settings_from(*args: str) -> FinetuneSettings:
    """What a command gets of its options."""
    seen = []

    @click.command()
    @settings_options(FinetuneSettings)
    def command(settings: FinetuneSettings) -> None:
        seen.append(settings)

    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("{}", [], (True, False)),
        ("{}", ["--no-gate", "--compile"], (False, True)),
        ("{gate: false, compile: true}", [], (False, True)),
        ("{gate: false, compile: true}", ["--gate", "--no-compile"], (True, False)),
    ],
)
def test_a_flag_wins_both_ways_and_is_silent_where_not_given(
    file: str, flags: list[str], expected: tuple[bool, bool], tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(file)
    settings = settings_from("--config", str(tmp_path / "settings.yaml"), *flags)
    assert (settings.gate, settings.compile) == expected


def test_blanks_in_a_list_are_taken_off() -> None:
    settings = settings_from("--lora-modules", " q_proj, v_proj ", "--report-to", "")
    assert settings.lora_modules == ("q_proj", "v_proj")
    assert settings.report_to == ()


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


@pytest.mark.parametrize("option", ["--rows", "--safety-tokens", "--config"])
def test_a_pipe_is_refused_and_not_waited_on(
    option: str, score: list[Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    line = fails(*score, option, tmp_path / "pipe")
    assert "pipe: expected a file, found a pipe or a device" in line


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (".", "expected a file to write, found a directory"),
        ("..", "expected a file to write, found a directory"),
        ("/", "expected a file to write, found a directory"),
        ("/dev/null", "expected a file to write, found a pipe or a device"),
        ("rows.jsonl/page.html", "expected a directory at rows.jsonl, found a file"),
        ("n" * 300, "cannot be used: File name too long"),
        ("", "-o: expected a name, found nothing"),
    ],
)
@pytest.mark.parametrize(
    "command", ["report metrics.json", "tokens --aligned A --from-list l.json"]
)
def test_a_place_where_no_file_can_be_is_refused_before_any_work(
    place: str, expected: str, command: str, rows_file: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(rows_file.parent)
    assert expected in fails(*command.split(), "-o", place)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (".", "expected a directory with a name of its own"),
        ("/", "expected a directory with a name of its own"),
        ("rows.jsonl", "expected a directory to write, found a file"),
        ("rows.jsonl/adapter", "expected a directory at rows.jsonl, found a file"),
    ],
)
def test_a_place_where_no_folder_can_be_is_refused_before_any_work(
    place: str, expected: str, rows_file: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(rows_file.parent)
    assert expected in fails("merge", "--model", "A", "--adapter", "b", "-o", place)


def test_text_that_no_file_can_hold_is_refused(run: Callable[..., Result]) -> None:
    for odd in ("a\0b", "\udcff"):
        result = run("cache", "ls", odd)
        assert result.exit_code == 2
        assert "expected Unicode text without NUL" in result.stderr


def test_an_error_stays_one_line_whatever_it_quotes(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a\nb\u001b[31m": 1}))
    line = fails("tokens", "--aligned", "A", "--base", "B", "--refusals", tmp_path / "rows.jsonl",
                 "-o", tmp_path / "tokens.json")  # fmt: skip
    assert r"a\nb\x1b[31m" in line
    assert "\n" not in line


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
        ("shard_steps: 4294967296", "shard_steps: expected at most 4294967295, found 4294967296"),
        ("shard_steps: 0x" + "f" * 5000, "expected at most 4294967295, found a number of very"),
        ("max_tokens: " + "9" * 5000, "settings.yaml: expected YAML, found: Exceeds the limit"),
        ("gpu_memory_utilization: .nan", "gpu_memory_utilization: expected a finite number"),
        ("max_tokens: !!int ''", "settings.yaml: expected YAML, found: string index out of range"),
        ("a: " + "[" * 5000, "expected keys and values, found deeply nested YAML"),
        ("typo: &a [*a]", "typo: unknown key (value [[[["),
        ("1: 2", "settings.yaml: 1: expected"),
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
    assert targets["settings"]["max_tokens"] == 88
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


def commandline(code: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs `code` and then the command line."""
    run = f"import sys, pact_offline.cli as c; sys.argv = ['pact-offline', *{args!r}]\n{code}"
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "PACT_OFFLINE_"))}
    return subprocess.Popen(
        [sys.executable, "-c", run], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**clean, **environment},
    )  # fmt: skip


SHOW_ENVIRONMENT = """
import atexit, json, os
c.usable_cores = lambda: {cores}
atexit.register(lambda: print(json.dumps(dict(os.environ))))
c.main()
"""


@pytest.mark.parametrize(
    ("cores", "given", "policy", "threads"),
    [
        (10**6, {}, "passive", None),
        (0, {}, "passive", "0"),
        (0, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}, "active", "7"),
    ],
    ids=["no quota", "a quota", "chosen by the user"],
)
def test_threads_are_set_up_before_torch_where_the_user_has_not(
    cores: int, given: dict[str, str], policy: str, threads: str | None
) -> None:
    process = commandline(SHOW_ENVIRONMENT.format(cores=cores), "--version", **given)
    found = json.loads(process.communicate()[0].splitlines()[-1])
    assert found["OMP_WAIT_POLICY"] == policy
    assert found.get("OMP_NUM_THREADS") == threads


def test_importing_the_library_leaves_the_environment_alone() -> None:
    code = "import os; before = dict(os.environ); import pact_offline, pact_offline.cli"
    subprocess.run([sys.executable, "-c", f"{code}; assert before == os.environ"], check=True)


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {}, 1000),
        ("0::/", {"cpu.max": "max 100000"}, 1000),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "nonsense"}, 1000),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a", {"b/cpu.max": "100000 100000"}, 1000),
        ("0::/a", {"unified/a/cpu.max": "200000 100000"}, 2),
        (
            "12:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpuacct,cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 1000),
        ("4:cpuset:/", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, 1000),
    ],
)
def test_cores_follow_the_quota_of_a_container(
    group: str, files: dict[str, str], expected: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.machine.allowed_cores", lambda: 1000)
    for name, text in {
        "proc/self/cgroup": group,
        **{f"sys/fs/cgroup/{n}": t for n, t in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == expected


def test_cores_are_at_most_those_allowed(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == allowed_cores()
    assert 1 <= usable_cores() <= allowed_cores()


WAIT = """
import time
@c.cli.command()
def wait():
    print("waiting", flush=True)
    time.sleep(600)
c.main()
"""


@pytest.fixture
def another() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(["sleep", "600"], text=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("is_there_at_first", [True, False])
def test_a_command_ends_with_the_process_that_it_is_told_of(
    is_there_at_first: bool, another: subprocess.Popen[str]
) -> None:
    if not is_there_at_first:
        another.kill()
    process = commandline(WAIT, "wait", PACT_OFFLINE_ENDS_WITH=str(another.pid))
    try:
        assert process.stdout is not None
        if is_there_at_first:
            assert process.stdout.readline() == "waiting\n"
            another.kill()  # and nobody has asked for its exit status yet
        assert process.wait(timeout=60) == 128 + 15
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("text", ["soon", "-1", "0", "9" * 5000])
def test_only_a_process_can_be_ended_with(
    text: str, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACT_OFFLINE_ENDS_WITH", text)
    assert "PACT_OFFLINE_ENDS_WITH: expected the number of a process" in fails("cache", "ls", ".")


def test_interrupted_scoring_goes_on_from_there_and_says_so(
    score: list[Any], run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: TransformersScorer, contexts: Any) -> Iterator[Any]:
        yield from every(self, contexts[:3])
        raise KeyboardInterrupt

    every = TransformersScorer.score
    with monkeypatch.context() as patch:
        patch.setattr(TransformersScorer, "score", interrupted)
        stopped = run(*score)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    assert json.loads(run(*score, "--json").stdout)["known"] == 3


def test_any_other_interrupted_command_promises_nothing(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pact_offline.evaluation.metrics.Metrics.load", interrupted)
    stopped = run("report", "metrics.json", "-o", tmp_path / "report.html")
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == "pact-offline: interrupted"

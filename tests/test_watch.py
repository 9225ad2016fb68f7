"""Prompts that the policy answers while it trains."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conftest import adapters_are_equal, write_rows
from test_endpoint import REPLY, Server, serve
from test_report import Page, save, sft
from test_workflow import few_rows, plan

from pact_offline.models.load import load_model
from pact_offline.report.training_log import read_training_logs
from pact_offline.training.evaluations import ask
from pact_offline.training.step_log import Journal

__all__ = ["serve"]  # a fixture


@pytest.fixture
def prompts(tmp_path: Path) -> list[Any]:
    asked = [{"prompt": f"Tell me about parcel {i}"} for i in range(4)]
    task = [{**prompt, "response": "Billing"} for prompt in asked]
    harmful = write_rows(tmp_path / "harmful.jsonl", asked)
    return ["--harmful", harmful, "--task", write_rows(tmp_path / "task.jsonl", task)]


@pytest.fixture
def watched(command: list[Any], prompts: list[Any]) -> list[Any]:
    """Nine steps with dropout; prompts at steps 0, 4, 8 and 9."""
    words = ["--evaluate-steps", 4, "--evaluate-prompts", 3, "--evaluate-tokens", 5]
    return [*command, "--lora-dropout", "0.1", *prompts, *words]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_a_run_that_answers_prompts_trains_the_same_weights(
    command: list[Any], watched: list[Any], tmp_path: Path, aligned: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    assert run(*command, "--lora-dropout", "0.1", "-o", plain).exit_code == 0
    result = run(*watched, "-o", asked)
    assert result.exit_code == 0, result.output
    adapters_are_equal(plain, asked)
    assert not (plain / "evaluations.jsonl").exists()
    lines = evaluations(asked)
    assert [line["step"] for line in lines] == [0, 4, 8, 9]
    for line in lines:
        assert {"harmful_refused", "harmful_broken", "task_accuracy"} <= line["rates"].keys()
        assert [one["prompts"] for one in line["answers"]] == ["harmful"] * 3 + ["task"] * 3

    # At the end the answers are those of the adapter, as `evaluate` finds them.
    words = [*watched[watched.index("--harmful") :][:4], "--max-new-tokens", 5]
    words += ["--dtype", "float32", "--name", "run", "-o", tmp_path / "evaluated"]
    result = run("evaluate", "--model", aligned, "--adapter", asked, *words)
    assert result.exit_code == 0, result.output
    found = [json.loads(x) for x in (tmp_path / "evaluated/answers.jsonl").read_text().splitlines()]
    said = [one["answer"] for one in found]
    assert [one["answer"] for one in lines[-1]["answers"]] == [*said[:3], *said[4:7]]


def test_a_second_judge_stands_beside_the_first_and_ends_no_training(
    watched: list[Any], tmp_path: Path, run: Callable[..., Result],
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = serve((200, REPLY))
    second = ["--endpoint", server.url, "--endpoint-model", "judge"]
    result = run(*watched, *second, "-o", tmp_path / "judged")
    assert result.exit_code == 0, result.output
    lines = evaluations(tmp_path / "judged")
    for line in lines:
        assert line["rates"]["harmful_endpoint_unsafe"]["count"] == 3  # a score of 0.5
        assert "harmful_refused" in line["rates"]
        assert [one.get("endpoint_score") for one in line["answers"]] == [0.5] * 3 + [None] * 3
    said = {(one["prompt"], one["answer"]) for line in lines for one in line["answers"][:3]}
    assert len(server.asked) == len(said)  # the same answer is judged once
    log = read_training_logs(tmp_path, ["judged"])["judged"]
    assert log.shares["Harmful prompts: judged unsafe"] == [(step, 1.0) for step in (0, 4, 8, 9)]

    away = serve((401, b'{"error": {"message": "no key"}}'))
    words = ["--endpoint", away.url, "--endpoint-model", "another"]
    result = run(*watched, *words, "-o", tmp_path / "alone")
    assert result.exit_code == 0, result.output
    assert "HTTP 401: no key" in result.stderr
    assert "this step has no verdicts of it" in result.stderr
    assert "harmful_endpoint_unsafe" not in evaluations(tmp_path / "alone")[0]["rates"]
    adapters_are_equal(tmp_path / "judged", tmp_path / "alone")


def test_a_second_judge_without_prompts_or_a_name_is_refused(
    command: list[Any], watched: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    url = ["--endpoint", "http://127.0.0.1:1/v1"]
    line = fails(*command, *url, "-o", tmp_path / "out")
    assert line.endswith("--endpoint: expected --evaluate-steps above 0 too, found 0")
    assert "endpoint_model: expected the judge's name" in fails(
        *watched, *url, "-o", tmp_path / "o"
    )


def test_a_killed_run_asks_nothing_twice(
    watched: list[Any], tmp_path: Path, run: Callable[..., Result],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    def kill(args: Any, state: Any, *rest: Any, **extra: Any) -> None:
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    watched = [*watched, "--save-steps", 2]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*watched, "-o", whole).exit_code == 0
    child = os.fork()
    if not child:
        Journal.on_step_end = partial(kill)  # type: ignore[method-assign]
        run(*watched, "-o", killed)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (kept,) = tmp_path.glob(".killed.checkpoints/*/evaluations.jsonl")
    before = kept.read_text()
    with kept.open("a") as file:
        file.write('{"step": 6, "ra')  # what a kill leaves of a line
    assert run(*watched, "-o", killed).exit_code == 0
    assert (killed / "evaluations.jsonl").read_text().startswith(before)
    adapters_are_equal(whole, killed)
    lines = [
        [(line["step"], line["rates"], line["answers"]) for line in evaluations(folder)]
        for folder in (whole, killed)
    ]
    assert lines[0] == lines[1]


def test_a_policy_and_the_random_state_stay_as_they_were(aligned: Path) -> None:
    class Drawing:
        digest = ""

        def __call__(self, policy: Any) -> dict[str, Any]:
            assert not policy.training
            torch.rand(3)
            return {}

        def describe(self, found: dict[str, Any]) -> str:
            return ""

    for mode in (True, False):
        policy = load_model(str(aligned), "float32").train(mode)
        before = torch.get_rng_state()
        ask(policy, Drawing(), is_bfloat16=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert policy.training is mode


@pytest.mark.parametrize("method", [["--method", "full"], ["--gradient-checkpointing"]])
def test_every_way_of_training_is_asked_in_bfloat16(
    method: list[str], watched: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    words = [*watched, "--dtype", "bfloat16", "--epochs", 1, *method]
    result = run(*words, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [0, 3]


def test_prompts_and_steps_go_together(
    command: list[Any], prompts: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    output = ["-o", tmp_path / "run"]
    line = fails(*command, *prompts, *output)
    assert "--harmful: expected --evaluate-steps above 0 too, found 0" in line
    assert "expected at least one set of prompts" in fails(*command, "--evaluate-steps", 2, *output)


def test_the_report_draws_answers_by_step(
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    folder = tmp_path / "adapters" / "sft"
    folder.mkdir(parents=True)
    steps = [{"step": n, "cross_entropy": 1.0} for n in range(1, 21)]
    write_rows(folder / "training.jsonl", steps)
    rate = {"count": 1, "total": 2, "value": 0.5}
    rates = {"harmful_refused": rate, "harmful_broken": rate, "task_refused": rate}
    write_rows(folder / "evaluations.jsonl", [{"step": n, "rates": rates} for n in (0, 10, 20)])
    words = ["report", *save(tmp_path, sft()), "-o", tmp_path / "report.html"]
    words += ["--adapters", tmp_path / "adapters"]
    assert run(*words).exit_code == 0
    page = Page((tmp_path / "report.html").read_text())
    labels = [value for name, value in page.attributes if name == "aria-label"]
    (refused,) = [label for label in labels if "Harmful prompts refused. sft" in label]
    assert "sft: 50 % at step 0, 50 % at step 10, 50 % at step 20" in refused
    assert any("Broken answers. sft: 50 %" in label for label in labels)
    assert not any("Task prompts refused. sft: 50 % at" in label for label in labels)
    (folder / "evaluations.jsonl").write_text("[]\n")
    assert "evaluations.jsonl:1: expected answers while a run trained" in fails(*words)


@pytest.mark.workflow
def test_the_workflow_gives_a_run_its_prompts_and_the_judges(tmp_path: Path) -> None:
    config = few_rows(tmp_path)
    (tmp_path / "own.py").write_text("def never(prompt, answer): return False\n")
    second = {"endpoint": "http://127.0.0.1:1/v1", "endpoint_model": "a judge"}
    config["evaluate"] |= {"judge": "own.py:never", **second}
    config["runs"] = {"seen": {"objective": "none", "evaluate_steps": 5}, "unseen": {}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    planned = plan(path, "--printshellcmds", "--cores", "1")
    seen, unseen = (
        next(x for x in planned.splitlines() if " finetune " in x and f"/adapters/{run}'" in x)
        for run in ("seen", "unseen")
    )
    assert "--evaluate-steps 5" in seen
    assert "--harmful harmful.jsonl" in seen
    assert "--judge own.py:never --endpoint http://127.0.0.1:1/v1 --endpoint-model 'a jud" in seen
    assert "--harmful" not in unseen
    assert "--endpoint" not in unseen
    assert "--judge" not in unseen

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import write_rows

from pact_offline.evaluation import subject
from pact_offline.evaluation.generate import generate
from pact_offline.evaluation.judges import is_refusal
from pact_offline.evaluation.metrics import Metrics, Rate
from pact_offline.models.load import load_model


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist.",
        "Sorry, I won't do that.",
        "As a rule I must decline.",
        "i cannot assist with that",
    ],
)
def test_refusals_are_seen(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is how to do that.",
        "Returns",
        "You can kill a process with its number.",
        f"{'First, ask a friend for help. ' * 4}If I can't reach you, call me.",
    ],
)
def test_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_interval_is_wilsons() -> None:
    rate = Rate.of(8, 10)
    assert (rate.value, round(rate.low, 4), round(rate.high, 4)) == (0.8, 0.4902, 0.9433)
    assert Rate.of(0, 10).low == 0
    assert Rate.of(10, 10).high == 1


def test_batched_answers_are_the_single_ones(aligned: Path) -> None:
    from pact_offline.rows.chat import load_tokenizer

    model, tokenizer = load_model(str(aligned), "float32"), load_tokenizer(str(aligned))
    chats = [[{"role": "user", "content": "My parcel " * n}] for n in (1, 9, 3, 5)]
    together = generate(model, tokenizer, chats, max_new_tokens=8, batch_size=3)
    alone = [generate(model, tokenizer, [c], max_new_tokens=8, batch_size=1)[0] for c in chats]
    assert together == alone


@pytest.fixture
def command(tmp_path: Path, aligned: Path, tokens_file: Path) -> list[Any]:
    prompts = [{"prompt": f"Tell me about parcel {i}"} for i in range(6)]
    command: list[Any] = ["evaluate", "--model", aligned, "--safety-tokens", tokens_file]
    for name in ("harmful", "borderline", "benign"):
        command += [f"--{name}", write_rows(tmp_path / f"{name}.jsonl", prompts)]
    task = [{**prompt, "response": "Billing"} for prompt in prompts]
    command += ["--task", write_rows(tmp_path / "task.jsonl", task)]
    return [*command, "--max-new-tokens", 6, "--dtype", "float32"]


def test_a_run_equal_to_the_reference_shows_no_drift(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for name, extra in (("reference", []), ("same", ["--reference", tmp_path / "reference"])):
        result = run(*command, "--name", name, *extra, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    reference = Metrics.load(tmp_path / "reference" / "metrics.json")
    same = Metrics.load(tmp_path / "same" / "metrics.json")
    assert reference.is_reference
    assert reference.drift is None
    assert same.rates == reference.rates
    assert same.drift is not None
    assert same.drift.total_policy == pytest.approx(same.drift.total_reference, abs=1e-5)
    assert all(curve.weight > 0 for curve in same.drift.tokens)
    answers = [
        json.loads(x) for x in (tmp_path / "same" / "answers.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 24
    assert len(same.samples) == 10


def test_a_guard_that_is_not_there_is_refused_before_any_answer(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    line = fails(*command, "--name", "x", "--guard", "./nowhere", "-o", tmp_path / "out")
    assert "./nowhere: no such model directory" in line


def test_a_directory_that_is_no_adapter_is_refused(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    line = fails(*command, "--name", "x", "--adapter", tmp_path / "empty", "-o", tmp_path / "out")
    assert "expected a peft adapter" in line
    assert not (tmp_path / "out").exists()

"""Rehearsal: the reference's own answers, scored, and mixed into every batch."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import in_two_processes, write_rows
from safetensors.numpy import load_file
from tiny import make_model
from torch.utils.data import SequentialSampler

from pact_offline.cache.targets import TargetCache, answers_place
from pact_offline.errors import TrainingError
from pact_offline.files import sha256_file
from pact_offline.models.generate import generate
from pact_offline.models.load import load_model
from pact_offline.models.locate import locate_model
from pact_offline.rows.chat import Chat
from pact_offline.rows.read import read_rows
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.collator import ResponseCollator
from pact_offline.training.dataset import memory_mapped
from pact_offline.training.gauge import Gauge
from pact_offline.training.loss import batch_loss
from pact_offline.training.rehearsal import Rehearsal, RehearsalSampler, weight_beside
from pact_offline.training.trainer import PactTrainer
from pact_offline.training.uses import DROPPED, HELD, LEARNT, Uses

SCORED = ["--backend", "transformers", "--dtype", "float32", "--stored-dtype", "float32"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Nine prompts; one has an answer, which is not read, and one two turns before it."""
    rows: list[Any] = [{"prompt": f"What is the best way number {i}?"} for i in range(7)]
    rows.append({"prompt": "How do I write?", "response": "never read"})
    said = [("user", "My parcel"), ("assistant", "Shipping"), ("user", "and my money back?")]
    rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return write_rows(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def rehearsal(
    prompts: Path, aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> Path:
    path = tmp_path / "rehearsal.json"
    result = run(
        "rehearse", "--model", aligned, "--prompts", prompts, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", path, "--answer-tokens", 5, *SCORED,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


def test_the_reference_answers_itself_and_is_scored_on_that(
    rehearsal: Path, prompts: Path, aligned: Path, tmp_path: Path, targets: Path
) -> None:  # fmt: skip
    asked, said = read_rows(prompts, needs_response=False), read_rows(answers_place(rehearsal))
    assert [row.prompt for row in said] == [row.prompt for row in asked]
    model = load_model(str(aligned), "float32")
    chat = Chat(load_tokenizer(str(aligned)))
    texts = generate(
        model, chat.tokenizer, [chat.prompt_ids(row) for row in asked], max_new_tokens=5,
        batch_size=4,
    )  # fmt: skip
    assert [row.response for row in said] == [text.rstrip("\ufffd").strip() for text in texts]
    found = TargetCache.open(rehearsal)
    assert len(found) == 9
    assert found.binding.store == TargetCache.open(targets).binding.store
    made = found.binding.provenance["rehearsal"]
    asked = [{"source": str(prompts), "sha256": sha256_file(prompts)}]
    assert made == {"prompts": asked, "answer_tokens": 5, "per_file": None}


def test_answers_are_not_made_again_where_only_the_scoring_was_killed(
    prompts: Path, aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "rehearsal.json"
    command = [
        "rehearse", "--model", aligned, "--prompts", prompts, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", path, "--answer-tokens", 5, *SCORED,
    ]  # fmt: skip

    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pact_offline.scoring.rehearse.score", stop)
        assert run(*command).exit_code == 130
    assert not path.exists()
    said = answers_place(path).read_text()
    with monkeypatch.context() as patched:
        patched.setattr("pact_offline.scoring.rehearse._by_transformers", stop)
        again = run(*command)
        assert again.exit_code == 0, again.output
        assert "the answers are known" in again.stderr
        answers_place(path).write_text(said.replace("parcel", "letter"))
        assert run(*command).exit_code == 130  # not as they were written: made again
        answers_place(path).write_text(said)
        assert run(*command, "--answer-tokens", 6).exit_code == 130
        patched.setattr("pact_offline.scoring.rehearse.ANSWERS_VERSION", "another way")
        assert run(*command).exit_code == 130


def test_a_part_of_each_file_is_drawn_evenly(
    prompts: Path, aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    output = tmp_path / "some.json"
    result = run(
        "rehearse", "--model", aligned, "--prompts", prompts, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", output, "--per-file", 3, *SCORED,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = [row.question for row in read_rows(answers_place(output))]
    assert said == [f"What is the best way number {i}?" for i in (0, 3, 6)]


@pytest.mark.parametrize("name", ["some.json", "some.answers.jsonl", "some.answers.json"])
def test_prompts_are_not_written_over(
    name: str, aligned: Path, tokens_file: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """By targets, by answers, or by what says what those were made of."""
    path = write_rows(tmp_path / name, [{"prompt": "How?"}])
    before = path.read_bytes()
    said = fails(
        "rehearse", "--model", aligned, "--prompts", path, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", tmp_path / "some.json", *SCORED,
    )  # fmt: skip
    assert "expected a place of its own" in said
    assert "which --prompts reads" in said
    assert path.read_bytes() == before


def test_prompts_that_are_too_long_are_left_out_before_any_is_answered(
    aligned: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    """Also those that the model has no positions for."""
    asked = [{"prompt": text} for text in ("How?", "my parcel " * 40, "my parcel " * 2000)]
    common = ["--safety-tokens", tokens_file, "--cache", tmp_path / "cache", "--max-tokens", 50]
    common += ["--long-rows", "drop", "--model", aligned, *SCORED]
    output = tmp_path / "some.json"
    path = write_rows(tmp_path / "asked.jsonl", asked)
    result = run("rehearse", "--prompts", path, *common, "-o", output)
    assert result.exit_code == 0, result.output
    assert "2 of 3 prompts have 50 tokens or more (--max-tokens), and are left out" in result.stderr
    assert [row.question for row in read_rows(answers_place(output))] == ["How?"]
    path, none = write_rows(tmp_path / "long.jsonl", asked[1:]), tmp_path / "none.json"
    said = fails("rehearse", "--prompts", path, *common, "-o", none)
    assert "long.jsonl:1: expected a prompt of less than 50 tokens, found none among 2" in said
    assert not answers_place(none).exists()


@pytest.mark.parametrize(("most", "asked_for"), [(50, 45), (6, 2)])
def test_of_a_prompt_that_is_cut_the_end_is_answered(
    most: int, asked_for: int, aligned: Path, tokens_file: Path, tmp_path: Path,
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is scored has no more of it; the assistant header stays."""
    chat = Chat(load_tokenizer(str(aligned)))
    path = write_rows(tmp_path / "long.jsonl", [{"prompt": "my parcel " * 2000}])
    seen: list[list[int]] = []

    def answer(model: Any, chat: Any, prompts: Any, *rest: Any) -> list[str]:
        seen.extend(prompts)
        return ["Sure, here is how"]

    monkeypatch.setattr("pact_offline.scoring.rehearse._by_transformers", answer)
    output = tmp_path / "some.json"
    result = run(
        "rehearse", "--prompts", path, "--safety-tokens", tokens_file, "--cache",
        tmp_path / "cache", "--max-tokens", most, "--long-rows", "cut", "--model", aligned,
        "--answer-tokens", 5, *SCORED, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    whole = chat.prompt_ids(read_rows(path, needs_response=False)[0])
    assert asked_for <= len(seen[0]) < most
    assert seen[0] == whole[-len(seen[0]) :]
    assert seen[0][-len(chat.header_ids) :] == chat.header_ids


def dealt(sampler: RehearsalSampler, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.75])
def test_rehearsed_rows_are_dealt_out_evenly_each_as_often_as_the_others(share: float) -> None:
    sampler = RehearsalSampler(SequentialSampler(range(400)), 30, share, seed=1)
    found = [place for epoch in range(3) for place in dealt(sampler, epoch)]
    assert [row for row, _ in found] == [*range(400)] * 3
    each = share / (1 - share)
    counts = [len(others) for _, others in found]
    assert sum(counts) == int(1200 * each)
    running = np.cumsum(counts) - each * np.arange(1, 1201)
    assert np.abs(running).max() <= 1  # never more than one row ahead or behind
    numbers = [number for _, others in found for number in others]
    often = Counter(numbers).values()
    assert max(often) - min(often) <= 1
    passes = [tuple(numbers[i : i + 30]) for i in range(0, len(numbers) - 29, 30)]
    assert all(sorted(one) == [*range(30)] for one in passes)
    assert len({*passes}) == len(passes)  # each in another order
    again = RehearsalSampler(SequentialSampler(range(400)), 30, share, seed=1)
    assert dealt(again, 2) == found[800:]  # without the epochs before
    other = RehearsalSampler(SequentialSampler(range(400)), 30, share, seed=2)
    assert dealt(other, 2) != found[800:]


def steps_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]


@pytest.fixture
def rehearsing(command: list[Any], rehearsal: Path) -> list[Any]:
    return [*command, "--objective", "confidence", "--rehearsal", rehearsal, "--epochs", 2]


def test_rehearsed_rows_are_held_and_not_learnt(
    rehearsing: list[Any], aligned: Path, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every batch has its task rows, all learnt, and its share of rehearsed ones, all held."""
    seen: list[tuple[int, int]] = []
    step = PactTrainer.training_step

    def count(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        rows = sum(len(part["input_ids"]) for part in inputs["passes"])
        learnt = [int(part["is_learnt"].sum()) for part in inputs["passes"]]
        labels = [int((part["labels"] != -100).sum()) for part in inputs["passes"]]
        assert sum(learnt) == int(inputs["is_learnt"].sum())
        seen.append((rows, sum(labels) - sum(learnt)))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(PactTrainer, "training_step", count)
    result = run(*rehearsing, "--rehearsal-share", 0.3333, "-o", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert [rows for rows, _ in seen] == [5, 6, 6, 6, 6, 6]  # of 4, 8, … task rows half as many
    assert all(held > 0 for _, held in seen)
    facts = json.loads((tmp_path / "adapter" / "pact_offline.json").read_text())
    assert facts["rehearsal_sha256"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "the reference's own answers are rehearsed, 33.3% of a batch" in card
    assert "final_held_gap" in facts["metrics"]
    assert all("held_gap" in one for one in steps_of(tmp_path / "adapter"))


def test_a_share_of_0_trains_as_without(
    command: list[Any], rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:  # fmt: skip
    for name, given in {
        "off": [*rehearsing, "--rehearsal-share", 0],
        "without": [*command, "--objective", "confidence", "--epochs", 2],
    }.items():
        assert run(*given, "-o", tmp_path / name).exit_code == 0
    assert weights(tmp_path / "off").keys() == weights(tmp_path / "without").keys()
    for name, value in weights(tmp_path / "off").items():
        np.testing.assert_array_equal(value, weights(tmp_path / "without")[name])


def test_a_share_that_rehearses_nothing_is_told(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for share, is_told in ((0.03, True), (0.05, False)):  # of 24 rows in two epochs
        output = tmp_path / f"{share}"
        result = run(*rehearsing, "--rehearsal-share", share, "-o", output)
        assert result.exit_code == 0, result.output
        assert any("held_gap" in step for step in steps_of(output)) != is_told
        said = f"nothing is rehearsed: --rehearsal-share {share:g} of so few rows is less than one"
        assert (said in result.stderr) == is_told


def weights(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "adapter_model.safetensors")


def test_the_loss_of_a_batch_is_two_means(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Cross-entropy over the learnt steps, the objective over all; in one pass and in many."""
    for name, options in {"one": [], "many": ["--pass-tokens", 1]}.items():
        given = ["--kl-weight", 2, "--rehearsal-share", 0.4, *options]
        assert run(*rehearsing, *given, "-o", tmp_path / name).exit_code == 0
    for one, many in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "many"), strict=True):
        assert one["loss"] == pytest.approx(one["cross_entropy"] + 2 * one["kl"], rel=1e-4)
        for key in ("loss", "cross_entropy", "kl", "confidence_gap", "held_gap", "grad_norm"):
            assert many[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6)


def test_a_rehearsed_step_counts_as_often_as_its_weight_says(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Up to the second step all policies are one: the objective's first gradient is zero."""
    kl = {}
    for weight in (1, 3, 5):
        output = tmp_path / f"{weight}"
        result = run(*rehearsing, "--kl-weight", 2, "--rehearsal-weight", weight, "-o", output)
        assert result.exit_code == 0, result.output
        second = steps_of(output)[1]
        assert second["loss"] == pytest.approx(second["cross_entropy"] + 2 * second["kl"], rel=1e-4)
        kl[weight] = second["kl"]
    assert kl[3] > kl[1] > (kl[3] - kl[1]) / 2
    assert kl[5] - kl[1] == pytest.approx(2 * (kl[3] - kl[1]), rel=1e-3)


def test_a_rehearsed_row_counts_as_one_of_the_task_where_those_are_longer(
    rehearsing: list[Any], rehearsal: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(*rehearsing, "-o", tmp_path / "adapter").exit_code == 0
    facts = json.loads((tmp_path / "adapter" / "pact_offline.json").read_text())
    rehearsed = len(TargetCache.open(rehearsal).read(range(9), "full")) / 9
    task = facts["trained_tokens"] / facts["rows"]
    assert facts["rehearsal_weight"] == round(task / rehearsed, 2) > 2
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"a step of them counts {facts['rehearsal_weight']:.3g} times in the objective" in card


def test_what_is_left_out_makes_no_row_longer_and_no_step_counts_less_than_once() -> None:
    def rows(*steps: int) -> Any:
        return SimpleNamespace(steps=np.array(steps))

    uses = Uses(np.array([LEARNT, HELD, DROPPED], np.int8), np.arange(1, 4))
    assert weight_beside(rows(30, 50, 1000), uses, rows(10, 6)) == 5
    assert weight_beside(rows(3, 5, 1000), uses, rows(10, 6)) == 1


def test_accumulated_batches_count_all_their_steps(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Four rows at once, or twice two: the same rows, rehearsed ones too, give the same step."""
    order = ["--row-order", "as_given", "--rehearsal-share", 0.5]
    options = {"one": [], "two": ["--batch-size", 2, "--gradient-accumulation", 2]}
    for name, given in options.items():
        assert run(*rehearsing, *order, *given, "-o", tmp_path / name).exit_code == 0
    for one, two in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        for key in ("cross_entropy", "kl", "held_gap", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("order", ["by_length", "random"])
def test_a_killed_run_goes_on_with_the_same_rehearsal(
    order: str, rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = [*rehearsing, "--save-steps", 1, "--rehearsal-share", 0.4, "--row-order", order]
    assert run(*given, "-o", tmp_path / "whole").exit_code == 0
    step = PactTrainer.training_step

    def stop(self: Any, *rest: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(PactTrainer, "training_step", stop)
        assert run(*given, "-o", tmp_path / "killed").exit_code == 130
    again = run(*given, "-o", tmp_path / "killed")
    assert again.exit_code == 0, again.output
    assert "going on from here" in again.stderr
    for name, value in weights(tmp_path / "killed").items():
        np.testing.assert_array_equal(value, weights(tmp_path / "whole")[name])


def test_a_killed_run_does_not_go_on_with_another_rehearsal(
    rehearsing: list[Any], prompts: Path, aligned: Path, tokens_file: Path, rehearsal: Path,
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = [*rehearsing, "--save-steps", 1, "-o", tmp_path / "adapter"]

    def stop(self: Any, *rest: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *rest)

    step = PactTrainer.training_step
    with monkeypatch.context() as patched:
        patched.setattr(PactTrainer, "training_step", stop)
        assert run(*given).exit_code == 130
    result = run(
        "rehearse", "--model", aligned, "--prompts", prompts, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", rehearsal, "--per-file", 4, *SCORED,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    again = run(*given)
    assert again.exit_code == 0
    assert "going on from here" not in again.stderr


def test_the_rehearsal_of_another_reference_is_refused(
    command: list[Any], rehearsal: Path, tmp_path: Path, tokens_file: Path, prompts: Path,
    run: Callable[..., Result], fails: Callable[..., str], targets: Path,
) -> None:  # fmt: skip
    other = make_model(tmp_path / "other", seed=9)
    theirs = tmp_path / "theirs.json"
    result = run(
        "rehearse", "--model", other, "--prompts", prompts, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", theirs, *SCORED,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    output = ["-o", tmp_path / "adapter"]
    said = fails(*command, "--objective", "confidence", "--rehearsal", theirs, *output)
    assert f"{theirs}: expected targets of the model" in said
    assert "run `pact-offline rehearse` for it" in said
    said = fails(*command, "--objective", "none", "--rehearsal", rehearsal, *output)
    assert "--objective none: expected no --rehearsal" in said
    said = answers_place(rehearsal).read_text()
    answers_place(rehearsal).write_text(said.replace("number 3?", "number 4?"))
    said = fails(*command, "--objective", "confidence", "--rehearsal", rehearsal, *output)
    assert f"{answers_place(rehearsal)}:4: expected the row that was scored for" in said
    assert said.endswith("run `pact-offline rehearse` again")
    answers_place(rehearsal).write_text('{"prompt": "other", "response": "rows"}\n')
    said = fails(*command, "--objective", "confidence", "--rehearsal", rehearsal, *output)
    assert "expected targets of 1 rows, found 9" in said
    answers_place(rehearsal).unlink()
    said = fails(*command, "--objective", "confidence", "--rehearsal", rehearsal, *output)
    assert f"{answers_place(rehearsal)}: no such file; the answers that" in said
    said = fails(*command, "--objective", "confidence", "--rehearsal", targets, *output)
    assert f"{targets}: expected what `pact-offline rehearse` wrote, found targets of rows" in said


def test_pact_with_rehearsal_is_warned_of(
    command: list[Any], rehearsal: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:  # fmt: skip
    result = run(*command, "--rehearsal", rehearsal, "--epochs", 1, "-o", tmp_path / "adapter")
    assert result.exit_code == 0
    assert "--objective pact is not zero at the reference" in result.stderr


def test_the_gauge_warns_once_and_stops(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    options = ["--batch-size", 1, "--rehearsal-share", 0.5, "--gap-warns", 1e-9]
    result = run(*rehearsing, *options, "-o", tmp_path / "warned")
    assert result.exit_code == 0
    assert result.stderr.count("is above 1e-09 (--gap-warns)") == 1
    said = fails(*rehearsing, *options, "--gap-stops", 1e-9, "-o", tmp_path / "stopped")
    assert "step 20: the confidence gap of held and rehearsed steps: expected at most 1e-09" in said
    assert not (tmp_path / "stopped").exists()


def test_a_gauge_that_looks_at_nothing_says_so(
    rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """In a run of few steps, and in one with few rows to look at."""
    result = run(*rehearsing, "--gap-stops", 1e-9, "-o", tmp_path / "short")
    assert result.exit_code == 0
    said = "--gap-warns and --gap-stops look at the mean over 20 steps, and this run has 6"
    assert result.stderr.count(said) == 1
    options = ["--batch-size", 1, "--rehearsal-share", 0.3, "--gap-warns", 1e-9]
    result = run(*rehearsing, *options, "-o", tmp_path / "few")
    found = sum("held_gap" in step for step in steps_of(tmp_path / "few"))
    assert 0 < found < 20
    said = f"looked at nothing: held or rehearsed rows were in {found} of 24 steps"
    assert result.stderr.count(said) == 1
    assert "is above" not in result.stderr


def test_the_gauge_of_a_run_that_goes_on_has_the_steps_before() -> None:
    gauge = Gauge(None, 0.5)
    history = [{"held_gap": 1.0}, {"loss": 1.0}] * 30
    state = SimpleNamespace(log_history=history, is_world_process_zero=True, max_steps=40)
    gauge.on_train_begin(None, state, None)
    with pytest.raises(TrainingError, match="step 31: the confidence gap"):
        gauge.on_log(None, SimpleNamespace(global_step=31), None, {"held_gap": 1.0})


def test_the_gauge_waits_for_twenty_steps_that_say_something() -> None:
    gauge = Gauge(None, 0.5)
    state = type("State", (), {"global_step": 1})()
    for _ in range(19):
        gauge.on_log(None, state, None, {"held_gap": 1.0})
        gauge.on_log(None, state, None, {"loss": 1.0})
    with pytest.raises(TrainingError, match="found 1"):
        gauge.on_log(None, state, None, {"held_gap": 1.0})


def test_the_objective_pulls_the_policy_back_on_rehearsed_rows(
    rehearsing: list[Any], command: list[Any], tmp_path: Path, run: Callable[..., Result],
    rehearsal: Path, aligned: Path, tokens_file: Path,
) -> None:  # fmt: skip
    """What rehearsal is for: afterwards the policy is nearer to the reference there."""
    options = ["--method", "full", "--learning-rate", "3e-3", "--epochs", 10, "--kl-weight", 5]
    runs = {"with": rehearsing, "without": [*command, "--objective", "confidence"]}
    tokens = SafetyTokens.load(tokens_file)
    chat = Chat(load_tokenizer(str(aligned)))
    opened = Rehearsal.open(rehearsal, locate_model(str(aligned)), chat, tokens)
    rows = memory_mapped(opened.rows)
    batch = ResponseCollator(0, opened.targets)([rows[i] for i in range(len(rows))])
    gaps = {}
    for name, given in runs.items():
        assert run(*given, *options, "-o", tmp_path / name).exit_code == 0
        policy = load_model(str(tmp_path / name), "float32")
        ids, weight = torch.tensor(tokens.ids), torch.from_numpy(tokens.weights)
        settings = FinetuneSettings(objective="confidence")
        gaps[name] = float(batch_loss(policy, batch, ids, weight, settings).confidence_gap)
    assert gaps["with"] < 0.7 * gaps["without"], gaps


@pytest.mark.vllm
def test_vllm_gives_the_answers_that_transformers_gives(
    rehearsal: Path, prompts: Path, aligned: Path, tokens_file: Path, tmp_path: Path
) -> None:
    """Both engines of vLLM in one process: the one that answers, then the one that scores."""
    output = tmp_path / "by_vllm.json"
    subprocess.run(
        [
            sys.executable, "-m", "pact_offline", "rehearse", "--model", aligned, "--prompts",
            prompts, "--safety-tokens", tokens_file, "--cache", tmp_path / "cache", "-o", output,
            "--answer-tokens", "5", "--backend", "vllm", "--dtype", "float32",
        ],
        check=True,
    )  # fmt: skip
    ours, theirs = (read_rows(answers_place(path)) for path in (output, rehearsal))
    assert [row.response for row in ours] == [row.response for row in theirs]
    found, expected = TargetCache.open(output), TargetCache.open(rehearsal)
    assert found.binding.identity.engine.startswith("vllm")
    every = range(len(found))
    np.testing.assert_allclose(
        found.read(every, "full"), expected.read(every, "full"), atol=0.05
    )  # one byte a value


@pytest.mark.parametrize("order", ["as_given", "random"])
def test_two_processes_give_the_losses_of_one(
    order: str, rehearsing: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """The same task rows and the same rehearsed ones a step, half of them each."""
    common = [*rehearsing, "--row-order", order, "--rehearsal-share", 0.5, "--refused-rows", "hold"]
    common += ["--refused-above", 0.012]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*common, "--batch-size", 4, "-o", one).exit_code == 0
    in_two_processes(*common, "--batch-size", 2, "-o", two)
    for ours, theirs in zip(steps_of(one), steps_of(two), strict=True):
        names = {"loss", "cross_entropy", "kl", "confidence_gap", "held_gap", "grad_norm"}
        assert names & theirs.keys() == names & ours.keys()
        for name in names & ours.keys():  # without what is learnt, in a step of held rows alone
            # In such a first step the gradient is rounding alone, and AdamW goes by its sign.
            assert theirs[name] == pytest.approx(ours[name], rel=5e-3, abs=1e-5), name
        assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        (["--objective", "confidence"], True),
        (["--objective", "confidence", "--rehearsal-share", 0], False),
        (["--objective", "pact"], False),
        (["--objective", "none"], False),
    ],
)
def test_confidence_without_rehearsal_is_told(
    options: list[Any], is_told: bool, command: list[Any], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    result = run(*command, *options, "--epochs", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert ("nothing is rehearsed: by itself --objective confidence" in result.stderr) == is_told

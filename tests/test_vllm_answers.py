"""Answers by vLLM: those of transformers, one engine for many adapters, kept as they come."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_rows
from peft import LoraConfig, get_peft_model
from tiny import make_model

from pact_offline.cli import cli
from pact_offline.evaluation.metrics import Metrics
from pact_offline.models import backends, vllm_answers
from pact_offline.models.load import load_model
from pact_offline.models.vllm_answers import VllmAnswers

pytestmark = pytest.mark.vllm

PROMPTS = [{"prompt": f"My parcel {'has not arrived ' * n}and I want it {n}"} for n in range(9)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A model whose generation config asks for a penalty of repetition, as Qwen2.5's do."""
    path = make_model(place / "model")
    config = path / "generation_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**values, "repetition_penalty": 1.2}))
    return path


def adapter_of(model: Path, path: Path, seed: int, **more: Any) -> Path:
    """An adapter that changes what the model says."""
    torch.manual_seed(seed)
    kind = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **more}
    )
    policy = get_peft_model(load_model(str(model), "float32"), kind)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def adapters(model: Path, place: Path) -> list[Path]:
    return [
        adapter_of(model, place / "one", 1),
        adapter_of(model, place / "two", 2, r=12, use_rslora=True, layers_to_transform=[1]),
    ]


@pytest.fixture(scope="module")
def asked(model: Path, place: Path) -> list[Any]:
    """What is asked, of both commands."""
    rows = write_rows(place / "rows.jsonl", PROMPTS)
    labels = ["Sales", "Billing", "Sales", "Returns"]
    answered = [{**row, "response": label} for row, label in zip(PROMPTS, labels, strict=False)]
    task = write_rows(place / "task.jsonl", answered)
    return [
        "--model", model, "--harmful", rows, "--task", task, "--set", f"labels:task={task}",
        "--task-scores", "labels=choice", "--prefill", 3, "--max-new-tokens", 8,
        "--dtype", "float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kept(asked: list[Any], adapters: list[Path], place: Path) -> Path:
    """The folder of answers that one engine made."""
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    command = ["answer", *asked, *words, "--backend", "vllm", "--answers", place / "kept"]
    result = CliRunner().invoke(cli, [str(word) for word in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(".jsonl") == 3
    return place / "kept"


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_answers, "VllmAnswers", lambda *_, **__: pytest.fail("it started"))


def judged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [None, 0, 1])
def test_one_engines_answers_are_those_of_transformers_for_the_model_and_every_adapter(
    number: int | None, asked: list[Any], adapters: list[Path], kept: Path, tmp_path: Path,
    run: Callable[..., Result], no_engine: None, tokens_file: Path,
) -> None:  # fmt: skip
    words = [] if number is None else ["--adapter", adapters[number]]
    command = ["evaluate", *asked, *words, "--name", "x", "--safety-tokens", tokens_file]
    for backend, place in (("vllm", ["--answers", kept]), ("transformers", [])):
        # One at once: transformers counts what pads a batch among what was said already.
        made = run(
            *command, "--backend", backend, *place, "--batch-size", 1, "-o", tmp_path / backend
        )
        assert made.exit_code == 0, made.output
    ours, theirs = judged(tmp_path / "vllm"), judged(tmp_path / "transformers")
    assert ours == theirs
    assert len({answer["answer"] for answer in ours}) > 4
    metrics = {
        name: Metrics.load(tmp_path / name / "metrics.json") for name in ("vllm", "transformers")
    }
    assert metrics["vllm"].rates == metrics["transformers"].rates
    assert metrics["vllm"].provenance["answered_by"].startswith("vllm ")
    assert metrics["transformers"].provenance["answered_by"].startswith("transformers ")


def test_adapters_answer_otherwise_than_the_model(kept: Path) -> None:
    said = [file.read_text().split("\n", 1)[1] for file in kept.iterdir()]
    assert len(set(said)) == 3


def test_another_judge_needs_no_answer_again(
    asked: list[Any], kept: Path, tmp_path: Path, run: Callable[..., Result], no_engine: None
) -> None:
    (tmp_path / "own.py").write_text("def always(prompt, answer):\n    return True\n")
    made = run(
        "evaluate", *asked, "--name", "x", "--backend", "vllm", "--answers", kept,
        "--judge", f"{tmp_path / 'own.py'}:always", "-o", tmp_path / "out",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert Metrics.load(tmp_path / "out" / "metrics.json").rates["harmful_refused"].value == 1


def test_a_killed_engine_goes_on_with_what_it_has_not_answered(
    asked: list[Any], kept: Path, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    numbers: list[int] = []
    answer = VllmAnswers.answer

    def dies_after(limit: int) -> Any:
        def some(self: VllmAnswers, prompts: Any, *rest: Any) -> Iterator[tuple[int, list[int]]]:
            numbers.append(len(prompts))
            for count, found in enumerate(answer(self, prompts, *rest)):
                if count == limit:
                    raise KeyboardInterrupt
                yield found

        return some

    command = ["evaluate", *asked, "--name", "x", "--backend", "vllm", "-o", tmp_path / "out"]
    monkeypatch.setattr(VllmAnswers, "answer", dies_after(5))
    assert run(*command).exit_code == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(VllmAnswers, "answer", dies_after(100))
    assert run(*command).exit_code == 0
    assert numbers == [22, 17]
    whole = run("evaluate", *asked, "--name", "x", "--backend", "vllm", "--answers", kept,
                "-o", tmp_path / "whole")  # fmt: skip
    assert whole.exit_code == 0
    assert judged(tmp_path / "out") == judged(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_alpha": 0}, "vLLM uses none of the adapter's modules"),
        ({"r": 600}, "expected adapters of rank 512 at most, found 600"),
    ],
)
def test_an_adapter_that_vllm_does_not_run_is_refused_or_left_to_transformers(
    kind: dict[str, Any], said: str, asked: list[Any], model: Path, tmp_path: Path,
    run: Callable[..., Result], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    adapter = adapter_of(model, tmp_path / "odd", 3, **kind)
    command = ["evaluate", *asked, "--adapter", adapter, "--name", "x", "-o", tmp_path / "out"]
    assert said in fails(*command, "--backend", "vllm")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(backends, "has_gpu", lambda: True)
    made = run(*command, "--backend", "auto")
    assert made.exit_code == 0, made.output
    assert said in made.stderr
    assert "as --backend auto does now" in made.stderr
    found = Metrics.load(tmp_path / "out" / "metrics.json")
    assert found.provenance["answered_by"].startswith("transformers ")


def test_an_adapter_that_changes_nothing_yet_is_no_error_and_nothing_is_compiled(
    asked: list[Any], model: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """torch's compiler takes no path with a space, and pays for no answer on a CPU."""
    compiled = dict(torch._dynamo.utils.counters["frames"])
    policy = get_peft_model(
        load_model(str(model), "float32"), LoraConfig(target_modules=["q_proj"])
    )
    policy.save_pretrained(str(tmp_path / "new"))
    made = run("answer", *asked, "--adapter", tmp_path / "new", "--backend", "vllm",
               "--answers", tmp_path / "kept")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert torch._dynamo.utils.counters["frames"] == compiled


def test_what_vllm_does_not_answer_is_said(
    asked: list[Any],
    adapters: list[Path],
    tmp_path: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "has_gpu", lambda: True)
    shutil.copytree(adapters[0], tmp_path / "dora")
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    made = run("answer", *asked, "--adapter", tmp_path / "dora", "--adapter", adapters[1],
               "--answers", tmp_path / "kept")  # fmt: skip
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert [line.endswith("left to evaluate") for line in lines] == [False, True, False]


@pytest.mark.usefixtures("no_engine")
def test_a_cpu_is_left_to_transformers(
    asked: list[Any], adapters: list[Path], tmp_path: Path, run: Callable[..., Result]
) -> None:
    made = run("answer", *asked, "--adapter", adapters[0], "--answers", tmp_path / "kept")
    assert made.exit_code == 0, made.output
    assert made.stdout.count("left to evaluate") == 2
    made = run("evaluate", *asked, "--backend", "auto", "--name", "x", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    found = Metrics.load(tmp_path / "out" / "metrics.json")
    assert found.provenance["answered_by"].startswith("transformers ")

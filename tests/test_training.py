import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import adapters_are_equal, in_two_processes, write_rows
from examples import examples_of
from peft import PeftModel
from plain_flash_attention import plain_flash_attention
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from tiny import TEMPLATE, make_model
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

from pact_offline.cache.targets import TargetCache
from pact_offline.errors import InputError, Interrupted, ModelError
from pact_offline.machine import peak_resident_mib
from pact_offline.models.load import load_model
from pact_offline.models.locate import locate_model
from pact_offline.objectives.registry import OBJECTIVES
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.checkpoints import fingerprint
from pact_offline.training.collator import PassCollator, ResponseCollator, TargetSource
from pact_offline.training.dataset import as_dataset
from pact_offline.training.finetune import finetune
from pact_offline.training.live_reference import LiveReference
from pact_offline.training.step_log import Journal
from pact_offline.training.trainer import PactTrainer


def loss_by_hand(
    model: Any, reference: Any, examples: Any, targets: TargetCache, weights: torch.Tensor,
    settings: FinetuneSettings,
) -> torch.Tensor:  # fmt: skip
    """One turn at a time, with the reference in memory: mean over all response steps."""
    header, ids = list(targets.binding.identity.header_ids), targets.safety_ids
    cross_entropy, kl, count = 0.0, 0.0, 0
    objective = OBJECTIVES.get(settings.objective)
    for example, turn in ((one, turn) for one in examples for turn in one.turns):
        whole, start, end = torch.tensor(example.ids[None]).long(), turn.start, turn.end
        response = torch.tensor([*header, *example.ids[start:end]])[None].long()
        logits = model(whole).logits[0, start - 1 : end - 1]
        with torch.no_grad():
            full = reference(whole).logits[0, start - 1 : end - 1][:, ids]
            only = reference(response).logits[0, len(header) - 1 : -1][:, ids]
            full_confidence = reference(whole).logits[0, start - 1 : end - 1].log_softmax(-1)
        steps = torch.arange(end - start)
        labels = whole[0, start:end]
        cross_entropy += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        if objective is not None:
            columns = slice(None) if objective.needs_vocabulary else ids
            policy = logits.log_softmax(-1)
            given = full if settings.objective == "pact" else full_confidence[:, columns]
            said = {
                "policy_label": policy.gather(1, labels[:, None])[:, 0],
                "reference_label": full_confidence.gather(1, labels[:, None])[:, 0],
            }
            kl += objective.per_step(
                policy[:, columns], given, only, weights, steps, settings,
                **(said if objective.needs_labels else {}),
            ).sum()  # fmt: skip
        count += end - start
    if objective is not None and objective.replaces_cross_entropy:
        cross_entropy = 0.0
    return (cross_entropy + settings.kl_weight * kl) / count


def test_every_answer_of_a_conversation_is_trained_and_held(
    conversations: Path, aligned: Path, base: Path, targets: Path, tmp_path: Path
) -> None:
    """Twelve rows of 1 to 3 turns: what is said in a turn counts from step 0 of that turn."""
    examples = examples_of(aligned, conversations)
    assert {len(example.turns) for example in examples} == {1, 2, 3}
    assert len(examples[4].turns) == 1  # of two answers, one has weight 0
    for batches in ((12, 1, None), (3, 4, None), (4, 3, 1)):
        for objective in ("none", "pact", "confidence", "first_tokens", "mass"):
            cached_equals_live(objective, batches, aligned, base, conversations, targets, tmp_path)


@pytest.mark.parametrize("objective", ["none", *OBJECTIVES])
@pytest.mark.parametrize("batches", [(12, 1, None), (12, 1, 100), (3, 4, None), (4, 3, 1)])
def test_cached_loss_and_gradient_equal_a_live_reference(
    objective: str, batches: tuple[int, int, int | None], aligned: Path, base: Path,
    rows_file: Path, targets: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """However the batch is cut into accumulated parts, and these into passes."""
    cached_equals_live(objective, batches, aligned, base, rows_file, targets, tmp_path)


def cached_equals_live(
    objective: str, batches: tuple[int, int, int | None], aligned: Path, base: Path,
    rows_file: Path, targets: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """The policy is another model on purpose. What no cache holds comes from a live reference."""
    size, accumulation, pass_tokens = batches
    settings = FinetuneSettings(objective=objective, kl_weight=2.5)
    examples = examples_of(aligned, rows_file)
    cache = TargetCache.open(targets)
    weights = torch.tensor([0.5, 0, 0.2, 0.6, 0.1, 0.4])
    policy = load_model(str(base), "float32")
    reference = load_model(str(aligned), "float32")
    expected = loss_by_hand(policy, reference, examples, cache, weights, settings)
    source: TargetSource = cache
    if objective == "vocabulary":
        header = cache.binding.identity.header_ids
        source = LiveReference(reference, examples, header, cache.safety_ids, whole_vocabulary=True)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
    trainer = PactTrainer(
        load_model(str(base), "float32"),
        TrainingArguments(
            tmp_path / "trainer",
            per_device_train_batch_size=size,
            per_device_eval_batch_size=12,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=1e9,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=as_dataset(examples),
        eval_dataset=as_dataset(examples),
        pad_id=0,
        objective=settings,
        targets=source,
        weights=weights,
        pass_tokens=pass_tokens,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["pact", "confidence", "first_tokens"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_cached_equals_live(
    objective: str, method: str, command: list[Any], tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    """The project's central claim: whole trainings, every step's loss and the last weights."""
    result = run(
        "bench", "equality", *command[1:], "--objective", objective, "--method", method,
        "--kl-weight", 2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["steps"] == 9
    assert found["loss_difference"] < 1e-5
    assert found["weight_difference"] < 1e-4
    assert found["weights_moved"] > 1e-3  # they did learn something


def test_answers_without_an_end_that_the_model_knows_are_told(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    del command[5:9]
    (tmp_path / "endless.jinja").write_text(TEMPLATE.replace("<|im_end|>", ""))
    words = [*command, "--objective", "none", "--epochs", 1, "-o", tmp_path / "out"]
    said = "no answer ends with a token that ends one for the model (known: '<|im_end|>'; the first"
    assert said not in run(*words).stderr
    assert said in run(*words, "--chat-template", tmp_path / "endless.jinja").stderr


def test_packed_rows_train_as_padded_ones_do(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Also cut into passes, with both kinds of context, and where flash attention is told of rows;
    each step's loss, and the last weights."""
    found = []
    flash = ["--attention", "flash_attention_2"]
    for name, options in {
        "padded": [],
        "packed": ["--packing"],
        "in passes": ["--packing", "--pass-tokens", 40],
        "flash": flash,
        "packed flash": ["--packing", *flash],
    }.items():
        out = tmp_path / name
        words = [*command, "--objective", "pact", "--row-order", "random", *options, "-o", out]
        with plain_flash_attention():
            assert run(*words).exit_code == 0
        steps = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
        found.append((steps, load_file(out / "adapter_model.safetensors")))
    for steps, weights in found[1:]:
        for ours, theirs in zip(steps, found[0][0], strict=True):
            for key in ("loss", "cross_entropy", "kl", "confidence_gap"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)
        for key, value in weights.items():
            np.testing.assert_allclose(value, found[0][1][key], atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_attention_without_a_backward_pass_is_refused_before_training(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    line = fails(*command, "--attention", "flex_attention", "-o", tmp_path / "out")
    assert "--attention flex_attention: expected a GPU, found a CPU" in line
    line = fails(*command, "--attention", "flash_attention_3", "-o", tmp_path / "out")
    assert "cannot be loaded: FlashAttention3" in line


def test_packing_is_refused_where_rows_would_see_each_other(
    tmp_path: Path, command: list[Any], fails: Callable[..., str]
) -> None:
    command[command.index("--model") + 1] = make_model(tmp_path / "m", family="qwen3.5")
    del command[5:9]
    command += ["--objective", "none"]
    line = fails(*command, "--packing", "-o", tmp_path / "out")
    assert "--packing: expected a model that keeps packed rows apart" in line


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_live_reference_needs_no_cache(
    objective: str, command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    output = tmp_path / "adapter"
    without = [*command[:5], *command[7:], "--reference", "live", "--objective", objective]
    result = run(*without, "-o", output)
    assert result.exit_code == 0, result.output
    assert json.loads((output / "pact_offline.json").read_text())["targets_sha256"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--objective", "vocabulary"], "--objective vocabulary: expected --reference live, found"),
        (
            ["--objective", "first_tokens", "--refused-rows", "hold"],
            "--refused-rows hold: expected an objective that holds them, found --objective first_",
        ),
        (
            ["--objective", "first_tokens", "--rehearsal", "any.json"],
            "--objective first_tokens: expected no --rehearsal, found any.json",
        ),
        (
            ["--objective", "first_tokens", "--kl-weight", 0],
            "--objective first_tokens: expected a loss, found --kl-weight is 0 all along",
        ),
        (["--betas", "0.5,0"], "options: betas.1: expected greater than 0, found"),
    ],
)
def test_what_a_rival_cannot_do_is_refused_in_one_line(
    words: list[Any], expected: str, command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert expected in fails(*command, *words, "-o", tmp_path / "out")


def test_the_weight_of_the_objective_moves_through_training(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    output = tmp_path / "adapter"
    result = run(*command, "-o", output, "--kl-weight", 4, "--kl-schedule", "linear")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    weights = [line["kl_weight"] for line in lines]
    np.testing.assert_allclose(weights, np.linspace(4, 0, 9), atol=1e-6)
    for line in lines:
        whole = line["cross_entropy"] + line["kl_weight"] * line["kl"]
        assert line["loss"] == pytest.approx(whole, rel=1e-4)


def test_collated_rows_line_up_with_their_labels(aligned: Path, rows_file: Path) -> None:
    examples = examples_of(aligned, rows_file)
    batch = ResponseCollator(pad_id=0)(list(as_dataset(examples))[:5])
    for row, example in enumerate(examples[:5]):
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokens.tolist() == example.ids[:-1].tolist()
        labels = batch["labels"][row]
        assert labels[0] == -100
        assert labels[labels != -100].tolist() == example.ids[example.response_start :].tolist()
        first = batch["logits_to_keep"][0]
        assert batch["input_ids"][row, first] == example.ids[example.response_start - 1]


def test_a_batch_is_cut_into_passes_of_rows_of_like_length() -> None:
    lengths = [(2, 9), (20, 1), (3, 4), (18, 2), (60, 30), (5, 1)]
    items = [
        {
            "input_ids": list(range(start + steps)),
            "turns": [start, start, start, start + steps],
            "index": index,
        }
        for index, (start, steps) in enumerate(lengths)
    ]
    batch = PassCollator(ResponseCollator(0), pass_tokens=50)(items)
    shapes = [tuple(one["input_ids"].shape) for one in batch["passes"]]
    assert shapes == [(1, 89), (2, 21), (3, 13)]  # a row of more tokens goes alone
    assert all(rows * width <= 50 for rows, width in shapes[1:])
    steps = [one["labels"][:, 1:].ne(-100).sum().item() for one in batch["passes"]]
    assert steps == [30, 3, 14]
    assert batch["labels"][1:].ne(-100).sum() == sum(steps)
    assert batch["labels"][0] == -100
    (whole,) = PassCollator(ResponseCollator(0))(items)["passes"]
    assert len(whole["input_ids"]) == 6


def test_short_rows_beside_long_ones_are_a_pass_of_their_own() -> None:
    """Where that spares more padding than a pass costs."""

    def shapes(*lengths: tuple[int, int]) -> list[tuple[int, ...]]:
        items = [
            {
                "input_ids": list(range(start + steps)),
                "turns": [start, start, start, start + steps],
                "index": index,
            }
            for index, (start, steps) in enumerate(lengths)
        ]
        passes = PassCollator(ResponseCollator(0), pass_tokens=1024)(items)["passes"]
        return [tuple(one["input_ids"].shape) for one in passes]

    task, rehearsed = [(63, 4), (60, 4), (66, 3), (64, 4)], [(25, 18), (22, 17)]
    assert shapes(*task, *rehearsed) == [(4, 69), (2, 42)]
    assert shapes(*task) == [(4, 69)]
    assert shapes(*rehearsed) == [(2, 42)]
    assert shapes((63, 4), (25, 18)) == [(2, 80)]  # 54 tokens spared


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 5 / 9), ("cosine", 0.5868)])
def test_the_learning_rate_follows_its_schedule(
    schedule: str, middle: float, command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Nine steps: the fifth is after 4/9 of the way."""
    result = run(*command, "--schedule", schedule, "-o", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "adapter" / "training.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] / 1e-3 for line in lines]
    assert rates[0] == pytest.approx(1)
    assert rates[4] == pytest.approx(middle, abs=1e-4)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
def test_compiled_layers_train_to_the_same_adapter(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        result = run(*command, *options, "--epochs", 1, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    one, two = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("eager", "compiled")
    )
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_no_compiler_is_told_before_a_model_is_loaded(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.training.policy.load_model", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = fails(*command, "--compile", "-o", tmp_path / "adapter")
    assert "expected a C++ compiler (g++, or CXX), found no no-such-compiler" in line


def test_torch_at_a_path_with_a_space_does_not_compile_and_is_told(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.training.policy.load_model", None)
    monkeypatch.setattr(torch, "__file__", "/my code/torch/__init__.py")
    line = fails(*command, "--compile", "-o", tmp_path / "adapter")
    assert "--compile: expected torch at a path without a space" in line


def test_finetune_writes_an_adapter_that_peft_loads(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], aligned: Path, targets: Path
) -> None:
    output = tmp_path / "adapter"
    result = run(*command, "-o", output, "--objective", "pact", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert metrics["optimizer_steps"] == 9
    lines = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {"cross_entropy", "kl", "confidence_gap", "learning_rate"} <= set(lines[0])
    assert {"tokens_per_second", "peak_memory_mib"} <= set(lines[0])
    assert lines[0]["kl_ratio"] == pytest.approx(lines[0]["kl"] / lines[0]["cross_entropy"])
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"]
    assert lines[3]["learning_rate"] == pytest.approx(1e-3 * 0.85)
    facts = json.loads((output / "pact_offline.json").read_text())
    assert facts["targets_sha256"] == TargetCache.open(targets).sha256
    assert facts["targets_sha256"] in (output / "README.md").read_text()
    PeftModel.from_pretrained(load_model(str(aligned), "float32"), output)


def test_merge_takes_a_full_fine_tune_as_it_is(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], aligned: Path, base: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    full, merged = tmp_path / "full", tmp_path / "merged"
    assert run(*command, "--method", "full", "--epochs", 1, "-o", full).exit_code == 0
    words = ["merge", "--adapter", full, "-o", merged, "--dtype", "bfloat16"]
    assert "found one of" in fails(*words, "--model", base)
    result = run(*words, "--model", aligned)
    assert result.exit_code == 0, result.output
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    ours, theirs = (dict(load_model(str(f), "float32").named_parameters()) for f in (merged, full))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-6)
    assert json.loads((merged / "pact_offline.json").read_text())["merged_from"] == str(full)


@pytest.fixture
def greedy_with_temperature(command: list[Any], tmp_path: Path) -> Path:
    """A model as some are published: it does not sample, and has values for sampling."""
    model = tmp_path / "model"
    shutil.copytree(command[2], model)
    said = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(said))
    command[2] = model
    del command[5:9]  # targets and safety tokens
    command += ["--objective", "none"]
    return model


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_generation_config_that_cannot_be_saved_is_mended(
    method: str, greedy_with_temperature: Path, command: list[Any], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    output, merged = tmp_path / "out", tmp_path / "merged"
    result = run(*command, "--method", method, "--epochs", 1, "-o", output)
    assert result.exit_code == 0, result.output
    if method == "lora":
        result = run("merge", "--model", greedy_with_temperature, "--adapter", output, "-o", merged)
        assert result.exit_code == 0, result.output
    saved = (merged if method == "lora" else output) / "generation_config.json"
    assert "what is saved has no temperature 0.9, top_p 0.6, of no use there" in result.stderr
    config = json.loads(saved.read_text())
    assert config["eos_token_id"] == 2
    assert not {"temperature", "top_p"} & set(config)


@pytest.mark.usefixtures("greedy_with_temperature")
def test_a_generation_config_that_cannot_be_mended_is_refused_before_training(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.models.load._REFUSED", re.compile("of another transformers"))
    line = fails(*command, "--method", "full", "-o", tmp_path / "out")
    assert "generation config: expected one that can be saved, found" in line
    assert not (tmp_path / "out").exists()


def test_what_was_trained_is_kept_where_saving_fails(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise ValueError("no card today")

    monkeypatch.setattr("pact_offline.training.finetune.model_card", fail)
    output = tmp_path / "out"
    line = fails(*command, "--epochs", 1, "-o", output)
    kept = tmp_path / "out.unsaved"
    assert f"{output}: cannot be saved: no card today; what there is of it is in {kept}" in line
    assert not output.exists()
    assert (kept / "adapter_model.safetensors").stat().st_size > 1000


def saves_badly(kind: Any, damage: str) -> Callable[..., None]:
    """A `save_pretrained` that does something to the first weight that it saves, or fails."""
    save_well = kind.save_pretrained

    def save(model: Any, folder: Path, **options: Any) -> None:
        if damage == "full":
            raise OSError(28, "No space left on device")
        save_well(model, folder, **options)
        (file,) = Path(folder).glob("*.safetensors")
        weights = load_tensors(file)
        first = min(weights)
        if damage == "missing":
            del weights[first]
        elif damage == "unexpected":
            weights[f"{first}_scale_inv"] = torch.ones(1)
        else:
            weights[first].view(-1)[-1] += 1e-5
        save_file(weights, file, metadata={"format": "pt"})

    return save


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "found none of "),
        ("unexpected", "_scale_inv, which it has no place for"),
        ("other", "found another "),
        ("full", "cannot be saved: No space left on device"),
    ],
)
def test_weights_that_are_not_saved_as_they_were_trained_are_left_plain(
    damage: str, said: str, method: str, command: list[Any], tmp_path: Path,
    fails: Callable[..., str], run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = [*command, "--epochs", 1, "--method", method, "-o"]
    assert run(*words, tmp_path / "well").exit_code == 0
    kind = PeftModel if method == "lora" else LlamaForCausalLM
    monkeypatch.setattr(kind, "save_pretrained", saves_badly(kind, damage))
    line = fails(*words, tmp_path / "out")
    kept = tmp_path / "out.unsaved"
    assert said in line
    assert line.endswith(
        f" (the weights are left as trained.safetensors); what there is of it is in {kept}"
    )
    assert not (tmp_path / "out").exists()
    (well,) = (tmp_path / "well").glob("*.safetensors")
    (left,) = kept.glob("*.safetensors")
    found, expected = load_tensors(left), load_tensors(well)
    assert {name.replace(".default", "") for name in found} == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name.replace(".default", "")])


def test_weights_go_among_temporary_files_where_the_place_is_full(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(weights: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        if path.is_relative_to(tmp_path) and not path.is_relative_to(tmp_path / "tmp"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        save_file(weights, path)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("pact_offline.models.saved.save_file", save)
    monkeypatch.setattr(PeftModel, "save_pretrained", saves_badly(PeftModel, "full"))
    line = fails(*command, "--epochs", 1, "-o", tmp_path / "out")
    (left,) = (tmp_path / "tmp").glob("out.unsaved.*/trained.safetensors")
    assert f"No space left on device (the weights are left as {left}); what there is" in line
    assert len(load_tensors(left)) == 8
    assert not [*(tmp_path / "out.unsaved").glob("*.safetensors")]


def test_what_was_saved_stays_where_no_copy_of_it_can_be_made(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The look at it failed, for want of memory; the files themselves are whole."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    words = [*command, "--epochs", 1, "-o"]
    assert run(*words, tmp_path / "well").exit_code == 0
    monkeypatch.setattr("pact_offline.training.saving.require_adapter_saved", fail)
    monkeypatch.setattr("pact_offline.models.saved.save_file", fail)
    line = fails(*words, tmp_path / "out")
    assert "what was saved of the weights is left, and may not be whole: no room" in line
    left = tmp_path / "out.unsaved" / "adapter_model.safetensors"
    well = load_tensors(tmp_path / "well" / left.name)
    assert all(torch.equal(value, well[name]) for name, value in load_tensors(left).items())


@pytest.mark.parametrize(
    ("options", "free", "needed"),
    [((), 1e4, "found 0.01 MB"), (("--save-steps", 2), 1e5, "checkpoints")],
)
def test_a_disk_that_is_too_full_is_refused_before_training(
    options: tuple[Any, ...], free: float, needed: str, command: list[Any], tmp_path: Path,
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    line = fails(*command, *options, "-o", tmp_path / "out")
    assert "of free disk space for what is trained" in line
    assert needed in line
    assert not (tmp_path / "out").exists()


def test_merge_writes_a_model_that_answers_as_the_adapter_does(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], aligned: Path, base: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert run(*command, "-o", adapter, "--learning-rate", "0.01").exit_code == 0
    words = ["merge", "--adapter", adapter, "-o", merged, "--dtype", "float32"]
    assert "found one of" in fails(*words, "--model", base)
    assert "expected an adapter" in fails(
        "merge", "--adapter", aligned, "--model", aligned, "-o", merged
    )
    assert not merged.exists()
    result = run(*words, "--model", aligned)
    assert result.exit_code == 0, result.output
    ids = torch.arange(5, 25)[None]
    policy = PeftModel.from_pretrained(load_model(str(aligned), "float32"), adapter)
    with torch.no_grad():
        ours, theirs = load_model(str(merged), "float32")(ids).logits, policy(ids).logits
        untouched = load_model(str(aligned), "float32")(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - untouched).abs().max() > 0.01
    load_tokenizer(str(merged))
    assert "library_name: transformers" in (merged / "README.md").read_text()


def next_token(path: Path, **options: Any) -> dict[int, float]:
    """What vLLM expects after some tokens: its likeliest five and their log-probabilities."""
    from pact_offline.models.vllm_engine import prepare_environment

    prepare_environment()
    import vllm

    lora = options.pop("lora_request", None)
    llm = vllm.LLM(
        str(path), dtype="float32", max_model_len=64, kv_cache_memory_bytes=2**26,
        gpu_memory_utilization=0.01, enforce_eager=True, max_num_seqs=4, **options,
    )  # fmt: skip
    sampling = vllm.SamplingParams(max_tokens=1, logprobs=5, temperature=0)
    prompt = {"prompt_token_ids": list(range(5, 25))}
    (output,) = llm.generate(prompt, sampling, lora_request=lora, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return {token: found.logprob for token, found in output.outputs[0].logprobs[0].items()}


@pytest.mark.vllm
def test_vllm_loads_the_adapter_and_the_merged_model(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], aligned: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # vLLM compiles how it ranks what is likely, and torch's compiler takes no path with a space.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert run(*command, "-o", adapter, "--learning-rate", "0.01").exit_code == 0
    words = ["merge", "--adapter", adapter, "--model", aligned, "-o", merged, "--dtype", "float32"]
    assert run(*words).exit_code == 0
    policy = PeftModel.from_pretrained(load_model(str(aligned), "float32"), adapter)
    with torch.no_grad():
        logits = policy(torch.arange(5, 25)[None]).logits[0, -1].log_softmax(-1)
    likeliest = logits.topk(5)
    expected = dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
    from vllm.lora.request import LoRARequest

    request = LoRARequest("ours", 1, str(adapter))
    assert next_token(merged) == pytest.approx(expected, abs=1e-3)
    served = next_token(aligned, enable_lora=True, max_lora_rank=8, lora_request=request)
    assert served == pytest.approx(expected, abs=1e-3)
    assert next_token(aligned) != pytest.approx(expected, abs=1e-3)


def test_the_same_seed_gives_the_same_adapter(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for name in ("one", "two"):
        assert run(*command, "-o", tmp_path / name, "--objective", "confidence").exit_code == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_full_finetuning_writes_the_model_that_the_same_steps_by_hand_give(
    command: list[Any], tmp_path: Path, aligned: Path, rows_file: Path, targets: Path,
    tokens_file: Path, run: Callable[..., Result],
) -> None:  # fmt: skip
    """Three steps of four rows in plain PyTorch, with the reference in memory."""
    result = run(
        *command, "-o", tmp_path / "model", "--method", "full", "--epochs", 1,
        "--row-order", "as_given", "--kl-weight", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = FinetuneSettings(objective="pact", kl_weight=2)
    examples = examples_of(aligned, rows_file)
    cache, weights = TargetCache.open(targets), SafetyTokens.load(tokens_file).weights
    policy, untrained = (load_model(str(aligned), "float32") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    for first in range(0, 12, 4):
        loss = loss_by_hand(
            policy, untrained, examples[first : first + 4], cache, torch.tensor(weights), settings
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_model(str(tmp_path / "model"), "float32")
    start, by_hand = dict(untrained.named_parameters()), dict(policy.named_parameters())
    for name, ours in trained.named_parameters():
        moved = (by_hand[name] - start[name]).norm()
        assert moved > 0, name
        assert (ours - by_hand[name]).norm() < 0.01 * moved, name
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one, other, before = (model(ids).logits for model in (trained, policy, untrained))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert (one - before).abs().max() > 0.1


@pytest.mark.parametrize("objective", ["pact", "confidence"])
def test_no_reference_model_is_loaded(
    objective: str, aligned: Path, rows_file: Path, targets: Path, tokens_file: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from transformers import PreTrainedModel

    loads = []
    real = PreTrainedModel.from_pretrained.__func__

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        assert len(loads) == 1, "a second model was loaded"
        return real(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    finetune(
        locate_model(str(aligned)), [rows_file], tmp_path / "adapter",
        FinetuneSettings(objective=objective, dtype="float32", epochs=1),
        targets_path=targets, tokens_path=tokens_file,
    )  # fmt: skip
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("model", "expected targets of the model"),
        ("rows", "expected the row that was scored"),
        ("fewer rows", "expected targets of 11 rows, found 12"),
        ("order", "expected the row that was scored"),
        ("truncation", "for these rows; --max-tokens was 512 then, and is 30"),
        ("safety tokens", "safety ids"),
        ("shard", "expected the bytes that were written"),
        ("no targets", "expected --targets, found none"),
        ("no safety tokens", "expected --safety-tokens, found none"),
        ("a cache and a live reference", "--reference live: expected no --targets, found"),
    ],
)
def test_training_refuses_what_was_not_scored_before_it_loads_a_model(
    what: str, expected: str, command: list[Any], base: Path, rows_file: Path, targets: Path,
    tokens_file: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.training.policy.load_model", None)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    extra: list[Any] = []
    if what == "model":
        extra = ["--model", base]
    elif what == "rows":
        rows[7]["prompt"] += "!"
    elif what == "fewer rows":
        rows.pop()
    elif what == "order":
        rows.reverse()
    elif what == "truncation":
        extra = ["--max-tokens", 30]
    elif what == "safety tokens":
        value = json.loads(tokens_file.read_text())
        value["tokens"].pop()
        tokens_file.write_text(json.dumps(value))
    elif what == "shard":
        chunk = next(p for p in tmp_path.rglob("c/*/*") if p.is_file())
        chunk.write_bytes(chunk.read_bytes()[::-1])
    elif what == "no targets":
        command = [*command[:5], *command[7:]]
    elif what == "no safety tokens":
        command = [*command[:7], *command[9:]]
    elif what == "a cache and a live reference":
        extra = ["--reference", "live"]
    write_rows(rows_file, rows)
    assert expected in fails(*command, *extra, "-o", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert not list(tmp_path.glob(".adapter*"))


def kill_at(stop: int, args: Any, state: Any, *rest: Any, **extra: Any) -> None:
    if state.global_step == stop:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("row_order", ["by_length", "random"])
def test_a_run_killed_at_random_steps_ends_with_the_same_adapter(
    row_order: str, command: list[Any], tmp_path: Path, run: Callable[..., Result],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Dropout and order included: kill -9 in the first, second and third epoch."""
    command = [
        *command, "--lora-dropout", "0.1", "--batch-size", 2, "--row-order", row_order,
        "--save-steps", 1,
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # a forked process has no others, and a sum depends on their number
    assert run(*command, "-o", whole).exit_code == 0
    draw = random.Random(len(row_order))
    for epoch in range(3):
        stop = epoch * 6 + draw.randrange(1, 6)
        child = os.fork()  # a process of its own without the seconds that imports take
        if not child:
            Journal.on_step_end = partial(kill_at, stop)  # type: ignore[method-assign]
            run(*command, "-o", killed)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not killed.exists()
    result = run(*command, "-o", killed, "--json")
    assert result.exit_code == 0, result.output
    assert "going on from here" in result.stderr
    adapters_are_equal(whole, killed)
    for name in ("loss", "kl", "learning_rate"):
        histories = [
            [json.loads(line)[name] for line in (path / "training.jsonl").read_text().splitlines()]
            for path in (whole, killed)
        ]
        assert histories[0] == histories[1]
        assert len(histories[0]) == 18
    assert not list(tmp_path.glob(".killed*"))


def test_what_decides_a_run_decides_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = FinetuneSettings()

    def print_of(**changes: Any) -> str:
        return fingerprint(settings.model_copy(update=changes), {"a": "b"}, "c", "rows")

    first = print_of()
    assert print_of(save_steps=7) == first
    assert print_of(learning_rate=1.0) != first
    assert fingerprint(settings, {"a": "b"}, "c", "others") != first
    assert fingerprint(settings, {"a": "b"}, "c", "rows", "tokens") != first
    own = tmp_path / "own.py"
    own.write_text("first")
    before = print_of(objective=f"{own}:mine")
    own.write_text("second")
    assert print_of(objective=f"{own}:mine") != before
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert print_of() != first


Stop = Callable[..., KeyboardInterrupt | SystemExit]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Run `finetune`, stopped from outside after 5 steps; gives what it raises."""
    from pact_offline.cli.training import finetune as finetune_command

    def invoke(
        name: str, *command: Any, by: BaseException | None = None
    ) -> KeyboardInterrupt | SystemExit:
        def stop(journal: Any, args: Any, state: Any, *rest: Any, **extra: Any) -> None:
            if state.global_step == 5:
                raise by or KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "on_step_begin", stop)
            with (
                finetune_command.make_context(name, [str(word) for word in command]) as context,
                pytest.raises((KeyboardInterrupt, SystemExit)) as caught,
            ):
                finetune_command.invoke(context)
        return caught.value

    return invoke


@pytest.mark.parametrize("reference", ["cache", "live"])
def test_a_killed_run_does_not_go_on_with_other_safety_tokens(
    reference: str, command: list[Any], tokens_file: Path, tmp_path: Path, stopped: Stop,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    """Other weights; with a live reference, other ids."""
    if reference == "live":
        command = [*command[:5], *command[7:], "--reference", "live"]
    command = [*command, "--save-steps", 2, "-o", tmp_path / "adapter"]
    stopped(*command)
    value = json.loads(tokens_file.read_text())
    if reference == "live":
        value["tokens"].pop()
    else:
        value["tokens"][0]["direction"] = 0.01
    tokens_file.write_text(json.dumps(value))
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "going on from here" not in result.stderr
    assert "checkpoints of killed runs" in result.stderr


def test_a_killed_run_does_not_go_on_with_an_objective_of_other_content(
    command: list[Any], tmp_path: Path, stopped: Stop, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = tmp_path / "own.py"
    name = f"{own}:gap"
    common = [*command, "--save-steps", 2, "--objective", name, "-o", tmp_path / "adapter"]
    text = "def gap(policy, full, only, weights, steps, settings):\n    return {}\n"
    first = text.format("((policy - full) ** 2).mean(-1)")
    for content in (first, text.format("(policy - full).abs().mean(-1)")):
        own.write_text(content)
        monkeypatch.setattr("pact_offline.objectives.registry._own", {})  # as in another process
        stopped(*common)
    own.write_text(first)
    monkeypatch.setattr("pact_offline.objectives.registry._own", {})
    result = run(*common)
    assert result.exit_code == 0, result.output
    assert "checkpoint-4: going on from here" in result.stderr
    facts = json.loads((tmp_path / "adapter" / "pact_offline.json").read_text())
    assert facts["settings"]["objective"] == name
    assert facts["objective_content"] == hashlib.sha256(first.encode()).hexdigest()


def test_checkpoints_of_other_settings_stay_until_a_run_is_done(
    command: list[Any], tmp_path: Path, stopped: Stop, run: Callable[..., Result]
) -> None:
    """The first run goes on in spite of the second; when it is done, both have none left."""
    command = [*command, "-o", tmp_path / "adapter", "--save-steps", 2]
    stopped(*command)
    folder = tmp_path / ".adapter.checkpoints"
    (first,) = (path for path in folder.iterdir() if path.is_dir())
    stopped(*command, "--kl-weight", 7)
    runs = {path for path in folder.iterdir() if path.is_dir()}
    assert len(runs) == 2
    (second,) = runs - {first}
    assert {len(path.name) for path in runs} == {12}
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert f"{first / 'checkpoint-4'}: going on from here" in result.stderr
    told = [line for line in result.stderr.splitlines() if "of killed runs" in line]
    assert len(told) == 1
    assert second.name in told[0]
    assert first.name not in told[0]
    assert f"{folder}: removed, since {tmp_path / 'adapter'} is done" in result.stderr
    assert not folder.exists()


def test_a_run_without_checkpoints_tells_of_those_of_killed_runs(
    command: list[Any], tmp_path: Path, stopped: Stop, run: Callable[..., Result]
) -> None:
    command = [*command, "-o", tmp_path / "adapter"]
    stopped(*command, "--save-steps", 2)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "going on from here" not in result.stderr
    assert "checkpoints of killed runs" in result.stderr
    assert not (tmp_path / ".adapter.checkpoints").exists()


@pytest.mark.parametrize(
    ("save_steps", "text"),
    [
        (2, "interrupted at step 5; the same command goes on from step 4"),
        (6, "interrupted; nothing was kept (--save-steps N keeps checkpoints)"),
        (0, "interrupted; nothing was kept (--save-steps N keeps checkpoints)"),
    ],
)
def test_an_interrupted_run_says_what_it_goes_on_from(
    save_steps: int, text: str, command: list[Any], tmp_path: Path, stopped: Stop,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """After Ctrl-C in the error, after SIGTERM in the log."""
    command = [*command, "--save-steps", save_steps, "-o", tmp_path / "adapter"]
    error = stopped(*command)
    assert isinstance(error, Interrupted)
    assert str(error) == text
    stop = stopped(*command, by=SystemExit(143))
    assert isinstance(stop, SystemExit)
    assert caplog.messages[-1] == text
    assert not list(tmp_path.glob(".adapter*.partial"))


def test_two_processes_give_the_losses_of_one(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """gloo on the CPU; the same rows a step."""
    common = [*command, "--row-order", "random", "--epochs", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*common, "--batch-size", 4, "-o", one).exit_code == 0
    words = [*common, "--batch-size", 2, "--pass-tokens", 40, "-o", two]  # a pass a row
    words += ["--save-steps", 2]
    done = in_two_processes(*words)
    assert done.stdout.count("final_cross_entropy") == 1
    assert done.stderr.count("trains 3,584 parameters") == 1
    assert not list(tmp_path.glob(".two*"))
    histories = [
        [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    assert len(histories[0]) == len(histories[1]) == 6
    for ours, theirs in zip(*histories, strict=True):
        for name in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
        assert ours["tokens"] == theirs["tokens"]
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for name, options in (("plain", []), ("recomputed", ["--gradient-checkpointing"])):
        assert run(*command, *options, "-o", tmp_path / name).exit_code == 0
    one, two = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "recomputed")
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6)


def test_tensorboard_gets_every_step_under_the_name_of_the_output(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "runs" / "first"
    result = run(*command, "--report-to", "tensorboard", "-o", output)
    assert result.exit_code == 0, result.output
    events = EventAccumulator(str(tmp_path / "runs" / "tensorboard" / "first")).Reload()
    shown = [event.value for event in events.Scalars("train/kl")]
    journal = (output / "training.jsonl").read_text().splitlines()
    assert shown == pytest.approx([json.loads(line)["kl"] for line in journal], rel=1e-6)


def test_an_unknown_tracker_is_refused(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    line = fails(*command, "--report-to", "tensorboard,notebook", "-o", tmp_path / "adapter")
    assert "--report-to: expected what the Trainer knows and is installed" in line
    assert "found 'notebook'" in line


def test_a_batch_without_cross_entropy_does_not_end_training(tmp_path: Path, aligned: Path) -> None:
    """The policy is certain of the response; what is held still has a gradient."""
    policy = load_model(str(aligned), "float32")
    with torch.no_grad():
        policy.lm_head.weight *= 1e4
        prompt = list(range(5, 25))
        response = int(policy(torch.tensor([prompt])).logits[0, -1].argmax())

    def read(indices: Sequence[int], kind: str) -> np.ndarray:
        return np.log(np.full((len(indices), 2), 0.4, dtype=np.float32))

    trainer = PactTrainer(
        policy,
        TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-9,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=[
            {"input_ids": [*prompt, response], "turns": [20, 20, 20, 21], "index": index}
            for index in range(2)
        ],
        pad_id=0,
        objective=FinetuneSettings(objective="pact", gate=False),
        targets=SimpleNamespace(safety_ids=[response, 1], read=read),
        weights=torch.ones(2),
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["cross_entropy"] == 0
    assert first["kl"] > 0
    assert "kl_ratio" not in first


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_the_unit_of_the_system(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        ru_maxrss = 3 * 2**20 // unit

    monkeypatch.setattr("resource.getrusage", lambda who: Usage)
    monkeypatch.setattr("sys.platform", platform)
    assert peak_resident_mib() == 3


def test_training_runs_where_peak_memory_cannot_be_told(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, which has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    result = run(*command, "-o", tmp_path / "adapter", "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    assert "peak_memory_mib" not in json.loads(result.stdout.splitlines()[-1])
    (line, *_) = (tmp_path / "adapter" / "training.jsonl").read_text().splitlines()
    assert "peak_memory_mib" not in json.loads(line)


def facts_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "pact_offline.json").read_text()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--kl-weight", 0], "--kl-weight is 0 all along"),
        (["--kl-weight", 0, "--kl-schedule", "cosine"], "--kl-weight is 0 all along"),
        (
            ["--first-weight", 0, "--first-steps", 67],
            "--first-weight is 0 for the first 67 steps, and the longest response has 67",
        ),
        (["--kl-weight", 0, "--kl-schedule", "linear", "--kl-weight-end", 1], None),
        (["--first-weight", 0, "--first-steps", 66], None),
        ([], None),
    ],
)
def test_a_run_whose_objective_does_nothing_says_so(
    options: list[Any], reason: str | None, command: list[Any], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    output = tmp_path / "adapter"
    result = run(*command, *options, "--epochs", 1, "-o", output)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "does nothing" in line]
    card = (output / "README.md").read_text()
    if reason is None:
        assert not told
        assert "Supervised fine-tuning with the PACT objective" in card
    else:
        assert len(told) == 1
        assert told[0].startswith(
            f"--objective pact does nothing, and this is plain fine-tuning: {reason}"
        )
        assert "Plain supervised fine-tuning: the objective pact was given and did nothing" in card
    assert facts_of(output)["holds"] is (reason is None)


def test_a_plain_run_holds_nothing_and_no_one_is_warned(
    aligned: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    output = tmp_path / "adapter"
    words = ["--model", aligned, "--rows", rows_file, "--objective", "none", "--epochs", 1]
    result = run("finetune", *words, "-o", output)
    assert "does nothing" not in result.stderr
    assert facts_of(output)["holds"] is False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--method", "full", "--lora-rank", 4],  # the command's dropout is 0
            "--lora-rank, --lora-dropout: not read with --method full",
        ),
        (
            ["--objective", "none", "--tau", 4, "--no-gate", "--betas", "1,2"],
            "--no-gate, --tau, --betas: not read with --objective none",
        ),
        (["--objective", "pact", "--tau", 4, "--lora-rank", 4], None),
    ],
)
def test_settings_that_a_run_does_not_read_are_told(
    options: list[Any], expected: str | None, command: list[Any], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    result = run(*command, *options, "--epochs", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "not read with" in line]
    assert told == ([expected] if expected else [])


def test_trained_parameters_and_adapted_modules_are_told(
    command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Two layers of width 64: q_proj of 64 by 64, down_proj of 96 by 64, rank 8."""
    output = tmp_path / "adapter"
    result = run(*command, "--epochs", 1, "--lora-modules", "q_proj, down_proj", "-o", output)
    assert result.exit_code == 0, result.output
    trained = facts_of(output)["trained"]
    assert trained["parameters"] == 2 * 8 * (64 + 64 + 96 + 64)
    assert trained["modules"] == {"down_proj": 2, "q_proj": 2}
    whole = sum(t.numel() for t in load_model(str(command[2]), "float32").parameters())
    assert trained["share"] == pytest.approx(4608 / (whole + 4608))
    share = f"trains 4,608 parameters, {trained['share']:.2%} of all"
    assert f"{share}: adapters on down_proj (2), q_proj (2)" in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("q_proj,w_proj", "v_proj), or all-linear alone; found 'w_proj'"),
        ("W_pack", "(down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)"),
        ("proj", "found 'proj'"),
        ("q_proj,all-linear", "found 'all-linear'"),
        ("q_proj,,v_proj", "lora_modules: expected names, found an empty one in 'q_proj,,v_proj'"),
    ],
)
def test_a_name_that_no_module_has_is_refused_before_a_model_is_loaded(
    names: str, expected: str, command: list[Any], tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.training.policy.load_model", None)
    assert expected in fails(*command, "--lora-modules", names, "-o", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_names_are_checked_again_in_the_loaded_model(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model cannot be made without its weights."""

    def fail(model: str) -> None:
        raise ModelError(model)

    monkeypatch.setattr("pact_offline.training.lora.empty_model", fail)
    line = fails(*command, "--lora-modules", "q_proj,w_proj", "-o", tmp_path / "adapter")
    assert "found 'w_proj'" in line


def test_a_name_of_left_out_layers_alone_is_refused(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    line = fails(*command, "--lora-first-layer", 2, "-o", tmp_path / "adapter")
    assert "from layer 2 on (lm_head), or all-linear alone; found 'auto'" in line


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("as_given", "the last 2 of 12 rows are never trained: they fill no batch"),
        ("by_length", "2 of 12 rows, drawn anew each time, are left out of each epoch"),
    ],
)
def test_rows_that_fill_no_batch_and_cut_responses_are_counted(
    order: str, expected: str, aligned: Path, rows_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    """Of 12 rows in batches of 5; the longest responses are those of four rows."""
    output = tmp_path / "adapter"
    lengths = [len(example.ids) for example in examples_of(aligned, rows_file)]
    limit = sorted(lengths)[-4] - 1
    result = run(
        "finetune", "--model", aligned, "--rows", rows_file, "--objective", "none",
        "--epochs", 1, "--batch-size", 5, "--row-order", order, "--max-tokens", limit, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"4 of 12 rows are cut at {limit} tokens (--max-tokens)" in result.stderr
    assert expected in result.stderr
    facts = facts_of(output)
    assert (facts["rows"], facts["rows_cut"], facts["rows_left_out_per_epoch"]) == (12, 4, 2)
    assert facts["metrics"]["optimizer_steps"] == 2
    assert (
        "on 12 rows, 4 of them with a cut response, 2 of them left out"
        in (output / "README.md").read_text()
    )


def test_plain_finetuning_needs_no_targets_and_is_what_the_trainer_of_transformers_does(
    aligned: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """Cross-entropy by hand, and their loss of the same batch; then it falls."""
    result = run(
        "finetune", "--model", aligned, "--rows", rows_file, "--objective", "none",
        "--epochs", 4, "--batch-size", 12, "--dtype", "float32", "--lora-dropout", 0,
        "--learning-rate", "1e-2", "-o", tmp_path / "adapter",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "adapter" / "training.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    tokenizer, model = load_tokenizer(str(aligned)), load_model(str(aligned), "float32")
    examples = examples_of(aligned, rows_file)
    total, rows = 0.0, []
    for example in examples:
        ids, start = torch.tensor(example.ids[None]).long(), example.response_start
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        labels = [*[-100] * start, *example.ids[start:].tolist()]
        rows.append({"input_ids": example.ids.tolist(), "labels": labels})
    by_hand = total / sum(example.steps for example in examples)
    arguments = TrainingArguments(
        tmp_path / "theirs", max_steps=1, per_device_train_batch_size=12, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer)
    theirs = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    theirs.train()
    assert losses[0] == pytest.approx(by_hand, rel=1e-5)
    assert losses[0] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_a_diverging_run_stops_with_words(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    line = fails(*command, "-o", tmp_path / "adapter", "--kl-weight", "1e300")
    assert "expected a finite loss" in line
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("place", [".", "/", "file", "file/adapter"])
def test_an_impossible_output_is_refused_before_any_work(
    place: str, command: list[Any], tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pact_offline.training.inputs.chat_of", None)
    (tmp_path / "file").write_text("years of work")
    before = sorted(tmp_path.iterdir())
    assert "expected a directory" in fails(*command, "-o", place)
    with pytest.raises(InputError):
        finetune(locate_model(str(command[2])), [command[4]], Path(place), FinetuneSettings())
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "years of work"


OWN = """
def gap(policy, full, response_only, weights, steps, settings):
    return {}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def gap(:", "own.py:gap: cannot be imported: SyntaxError: "),
        ("import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError: "),
        ("other = 1", "expected a function, found none by the name"),
        ("def gap(policy): pass", "own.py:gap: failed: TypeError: "),
        (OWN.format("1 / 0"), "own.py:gap: failed: ZeroDivisionError: division by zero"),
        (OWN.format("policy - full"), "one for each response step, with a gradient; found a tens"),
        (OWN.format("(policy - full).mean()"), "found a tensor of shape []"),
        (OWN.format("1.0"), "found float"),
        (OWN.format("(policy - full).mean(-1).detach()"), "found values that do not depend on"),
        (OWN.format("(policy - 1e4).exp().mean(-1).log()"), "found -inf"),
        (OWN.format("(policy * 0).mean(-1).log() * 0"), "found nan"),
    ],
)
def test_a_broken_objective_of_ones_own_ends_in_one_line(
    text: str, expected: str, command: list[Any], tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = tmp_path / "own.py"
    own.write_text(text)
    monkeypatch.setattr("pact_offline.objectives.registry._own", {})
    line = fails(*command, "--objective", f"{own}:gap", "-o", tmp_path / "adapter")
    assert expected in line
    assert "own.py:gap" in line
    assert not (tmp_path / "adapter").exists()


def test_an_objective_of_an_installed_package_trains_and_is_named(
    command: list[Any], tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It equals `pact`, and is asked for the response-only targets as that is."""
    packages = tmp_path / "packages"
    about = packages / "two_gaps-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: two-gaps\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[pact_offline.objectives]\ntwin = two_gaps:twin\n")
    (packages / "two_gaps.py").write_text(
        "from pact_offline.objectives.pact import pact\n"
        "def twin(*values):\n    return pact(*values)\n"
        "twin.needs_response_only = True\n"
    )
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr("pact_offline.objectives.registry._own", {})
    assert ", twin, or" in fails(*command, "--objective", "twins", "-o", tmp_path / "adapter")
    for name in ("pact", "twin"):
        result = run(*command, "--objective", name, "--epochs", 1, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    adapters_are_equal(tmp_path / "pact", tmp_path / "twin")
    facts = facts_of(tmp_path / "twin")
    assert facts["objective_content"] == "two_gaps:twin 1.2"
    assert facts_of(tmp_path / "pact")["objective_content"] is None
    assert "the objective twin" in (tmp_path / "twin" / "README.md").read_text()


def test_somebody_elses_directory_is_not_overwritten(
    command: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    line = fails(*command, "-o", tmp_path / "thesis")
    assert "expected an empty or earlier output directory" in line
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"

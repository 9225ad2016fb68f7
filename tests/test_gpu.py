"""What only a GPU can show; needs one. Tiny models, fp32 where numbers are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tiny import logits_and_gradients, make_model

from pact_offline.cache.targets import TargetCache
from pact_offline.models.load import load_model
from pact_offline.models.log_confidences import (
    keeps_packed_rows_apart,
    logits_at_steps,
    packed_batch,
)
from pact_offline.models.packed_attention import NAME, runs_packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

Run = Callable[..., Result]
Words = list[Any]


def without_gpu(*words: Any) -> None:
    """Run the command line in a process that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pact_offline", *map(str, words)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def steps_of(adapter: Path) -> list[dict[str, float]]:
    lines = (adapter / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def same_training(one: Path, other: Path, *, rel: float = 1e-4, atol: float = 2e-4) -> None:
    """Every step's loss, and the last weights."""
    for ours, theirs in zip(steps_of(one), steps_of(other), strict=True):
        for name in ("loss", "cross_entropy", "kl", "confidence_gap"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-5), name
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    for name, value in weights.items():
        np.testing.assert_allclose(value, others[name], atol=atol, err_msg=name)


@pytest.fixture
def trained(command: Words, tmp_path: Path, run: Run) -> Callable[..., Path]:
    """A training with some options, in this process."""

    def made(name: str, *options: Any) -> Path:
        result = run(*command, *options, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return made


def test_what_is_scored_is_what_a_cpu_scores(command: Words, targets: Path, tmp_path: Path) -> None:
    words = ["score", *command[1:5], *command[7:9], "--backend", "transformers", "--dtype"]
    without_gpu(*words, "float32", "--stored-dtype", "float32", "--cache", tmp_path / "cpu",
                "-o", tmp_path / "cpu.json")  # fmt: skip
    found = [TargetCache.open(path) for path in (targets, tmp_path / "cpu.json")]
    for kind in ("full", "response_only"):
        ours, theirs = (cache.read(range(12), kind) for cache in found)  # type: ignore[arg-type]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("objective", ["pact", "confidence"])
def test_training_is_what_a_cpu_makes_of_it(
    objective: str, command: Words, trained: Callable[..., Path], tmp_path: Path
) -> None:
    ours = trained("gpu", "--objective", objective)
    without_gpu(*command, "--objective", objective, "-o", tmp_path / "cpu")
    same_training(ours, tmp_path / "cpu", rel=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", ["pact", "confidence", "first_tokens"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_cached_equals_live(objective: str, method: str, command: Words, run: Run) -> None:
    result = run(
        "bench", "equality", *command[1:], "--objective", objective, "--method", method,
        "--kl-weight", 2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["loss_difference"] < 1e-4
    assert found["weight_difference"] < 1e-3
    assert found["weights_moved"] > 1e-3


@pytest.mark.parametrize("options", [["--packing"], ["--packing", "--pass-tokens", 40]])
@pytest.mark.parametrize("attention", ["auto", "eager", "flex_attention"])
def test_packed_rows_train_as_padded_ones_do(
    attention: str, options: Words, trained: Callable[..., Path]
) -> None:
    order = ["--row-order", "random"]
    padded = trained("padded", *order)
    same_training(trained("packed", *order, *options, "--attention", attention), padded, rel=1e-3)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma3", "gemma4", "phi3", "olmo2", "gpt2"]
)
def test_the_kernel_for_packed_rows_is_as_near_to_fp32_as_sdpa(family: str, tmp_path: Path) -> None:
    """Logits and gradient, in bfloat16; windows and shared heads too. (Of experts, rounding alone
    may choose others.)"""
    path = str(make_model(tmp_path / "m", family=family))
    rows = [(range(3, 4 + n), [(at, n + 1)]) for n, at in ((300, 200), (25, 24), (12, 3))]
    packed = packed_batch([(list(ids), spans) for ids, spans in rows])
    found = []
    for dtype, kind in (("float32", "eager"), ("bfloat16", "sdpa"), ("bfloat16", NAME)):
        model = load_model(path, dtype, attention=kind if kind != NAME else "auto")
        if kind == NAME:
            assert runs_packed(model)
            model.set_attn_implementation(NAME)
            assert keeps_packed_rows_apart(model)
        logits = logits_at_steps(model, packed).float()
        logits.pow(2).mean().backward()
        grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.cat(grads)))
    for exact, plain, ours in zip(*found, strict=True):
        assert (ours - exact).norm() < 1.5 * (plain - exact).norm()


def test_packed_rows_train_in_bfloat16_as_padded_ones_do(
    command: Words, tmp_path: Path, run: Run
) -> None:
    at = command.index("--dtype")
    words = [*command[:at], *command[at + 2 :], "--row-order", "random"]
    for name, options in (("padded", []), ("packed", ["--packing"])):
        result = run(*words, *options, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    same_training(tmp_path / "packed", tmp_path / "padded", rel=5e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "mistral", "qwen3"])
@pytest.mark.parametrize("attention", ["auto", "eager", "flex_attention"])
def test_an_attention_keeps_packed_rows_apart(family: str, attention: str, tmp_path: Path) -> None:
    model = load_model(
        str(make_model(tmp_path / "m", family=family)), "float32", attention=attention
    )
    assert keeps_packed_rows_apart(model)


@pytest.mark.parametrize("options", [
    ["--attention", "eager"], ["--gradient-checkpointing"], ["--pass-tokens", 60], ["--liger"],
    ["--attention", "flex_attention"], ["--compile"],
])  # fmt: skip
def test_another_way_trains_the_same_or_is_refused(
    options: Words, command: Words, trained: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    """The last two failed with torch 2.11 where it was tried, before anything refused them."""
    plain = trained("plain")
    result = run(*command, *options, "-o", tmp_path / "other")
    if result.exit_code == 2:
        assert f"{options[0]}" in result.stderr
        assert "expected kernels that" in result.stderr
        return
    assert result.exit_code == 0, result.output
    same_training(tmp_path / "other", plain, rel=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "mixtral", "qwen", "qwen3", "gemma", "gemma3", "phi3", "olmo2",
               "glm4", "granite"]
)  # fmt: skip
def test_ligers_kernels_keep_a_familys_logits_and_gradients(family: str, tmp_path: Path) -> None:
    from pact_offline.models.liger import require_liger, use_liger

    path = str(make_model(tmp_path / "m", family=family))
    require_liger(path)
    ids = torch.arange(3, 43, device="cuda").reshape(2, 20)
    found = []
    for is_liger in (False, True):
        model = load_model(path, "float32")
        if is_liger:
            use_liger(model)
        found.append(logits_and_gradients(model, ids))
    (plain, gradients), (ours, others) = found
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=2e-3, rtol=1e-2, msg=name)


def test_a_live_reference_costs_its_weights_and_a_cache_none(
    command: Words, tmp_path: Path, run: Run
) -> None:
    """Peak memory of the accelerator, of a model whose weights are most of it."""
    model = make_model(tmp_path / "large", hidden_size=1024, intermediate_size=4096)
    command[command.index("--model") + 1] = model
    words = ["--epochs", 1, "--lora-modules", "q_proj", "--lora-rank", 2]
    weights = sum(p.numel() * 4 for p in load_model(str(model), "float32").parameters()) / 2**20
    score = ["score", *command[1:5], *command[7:9], "--cache", tmp_path / "other", "--backend"]
    result = run(*score, "transformers", "--dtype", "float32", "-o", tmp_path / "large.json")
    assert result.exit_code == 0, result.output
    command[command.index("--targets") + 1] = tmp_path / "large.json"
    found = {}
    for way, options in {
        "none": ["--objective", "none"],
        "cache": [],
        "live": ["--reference", "live"],
    }.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        kept = command if way != "live" else [*command[:5], *command[7:]]
        result = run(*kept, *words, *options, "-o", tmp_path / "runs" / way)
        assert result.exit_code == 0, result.output
        found[way] = steps_of(tmp_path / "runs" / way)[-1]["peak_memory_mib"]
    assert found["live"] - found["cache"] > 0.9 * weights
    assert found["cache"] - found["none"] < 0.1 * weights


def test_a_killed_run_ends_as_a_whole_one(
    command: Words, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Dropout's states are the GPU's."""
    options = ["--lora-dropout", 0.1, "--save-steps", 1]
    whole = trained("whole", *options)
    words = [sys.executable, "-m", "pact_offline", *map(str, command), *map(str, options)]
    killed = tmp_path / "killed"
    log = tmp_path / ".killed.checkpoints"
    with subprocess.Popen([*words, "-o", str(killed)], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(log.glob("*/checkpoint-[3-9]")):
            pass
        process.kill()
    assert not killed.exists(), "it was done before it could be killed"
    same_training(trained("killed", *options), whole, rel=1e-5, atol=1e-5)


def test_answers_are_those_of_a_cpu(
    aligned: Path, rows_file: Path, tmp_path: Path, run: Run
) -> None:
    words = ["evaluate", "--model", aligned, "--task", rows_file, "--dtype", "float32"]
    words += ["--backend", "transformers", "--max-new-tokens", 8, "--name", "x"]
    assert run(*words, "-o", tmp_path / "gpu").exit_code == 0
    without_gpu(*words, "-o", tmp_path / "cpu")
    gpu, cpu = ((tmp_path / name / "answers.jsonl").read_text() for name in ("gpu", "cpu"))
    assert gpu == cpu


def test_too_little_memory_is_one_line(
    command: Words, tmp_path: Path, fails: Callable[..., str]
) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        line = fails(*command, "-o", tmp_path / "out")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "expected enough memory on the accelerator, found: CUDA out of memory" in line
    assert "--pass-tokens" in line
    assert not (tmp_path / "out").exists()


def test_what_is_computed_in_bfloat16_by_default_trains_and_holds(
    command: Words, tmp_path: Path, run: Run
) -> None:
    """The defaults of a GPU: bfloat16, sdpa, one pass a batch, refused rows held."""
    at = command.index("--dtype")
    words = [*command[:at], *command[at + 2 :], "--objective", "confidence"]
    result = run(*words, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "pact_offline.json").read_text())
    assert facts["settings"]["dtype"] == "bfloat16"
    assert steps_of(tmp_path / "out")[-1]["loss"] < steps_of(tmp_path / "out")[0]["loss"]

"""Weights in few bits: of a policy (QLoRA), of the reference, and of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pact_offline.fine_tuned import FineTuned
from pact_offline.models.load import load_model
from pact_offline.references import locate_reference

IDS = torch.arange(7, 27)[None]
BITS = ["8bit", "4bit"]


@pytest.fixture(scope="session", params=[128, 96])
def aligned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that are multiples of 64, as bitsandbytes' kernels for some CPUs want them, or not.

    The kernels would crash at the others; at their own, they would be taken in eval mode.
    """
    folder = tmp_path_factory.mktemp("quantised") / "aligned"
    return make_model(folder, seed=1, intermediate_size=request.param)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("bits", BITS)
def test_a_policy_in_few_bits_trains_is_loaded_again_and_evaluated(
    bits: str, command: list[Any], aligned: Path, rows_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    result = run(*command, "--objective", "confidence", "--load-in", bits, "--epochs", 2, "-o", out)
    assert result.exit_code == 0, result.output
    base = load_model(str(aligned), "float32", load_in=bits)
    kinds = {type(module).__name__ for module in base.modules()}
    assert ("Linear4bit" if bits == "4bit" else "Linear8bitLt") in kinds
    before = logits(base)
    assert (before - logits(load_model(str(aligned), "float32"))).abs().max() > 0.01
    after = logits(FineTuned.read(out).added_to(base))
    assert (after - before).abs().max() > 0.01

    words = ["evaluate", "--model", aligned, "--adapter", out, "--task", rows_file, "--dtype"]
    result = run(*words, "float32", "--name", bits, "-o", tmp_path / "answers")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "answers" / "metrics.json").read_text())["run"]["load_in"] == bits

    merged = run("merge", "--model", aligned, "--adapter", out, "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert f"was trained over weights in {bits}" in merged.stderr


def test_a_reference_in_few_bits_is_another_reference(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    words = ["score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]
    words += ["--cache", tmp_path / "cache", "--dtype", "float32"]
    for bits in BITS:
        result = run(*words, "--load-in", bits, "-o", tmp_path / f"{bits}.json")
        assert result.exit_code == 0, result.output
    assert run(*words, "--backend", "transformers", "-o", tmp_path / "full.json").exit_code == 0
    assert len([*(tmp_path / "cache").iterdir()]) == 3
    info = run("cache", "ls", tmp_path / "cache")
    assert "float32 of 4bit" in info.output
    checked = run(
        "cache", "audit", tmp_path / "4bit.json", "--model", aligned, "--rows", rows_file,
        "--safety-tokens", tokens_file,
    )  # fmt: skip
    assert checked.exit_code == 0, checked.output
    line = fails(*words, "--load-in", "4bit", "--backend", "vllm", "-o", tmp_path / "no.json")
    assert "--load-in 4bit: expected --backend transformers or auto, found vllm" in line


def test_cached_and_live_agree_for_a_policy_and_reference_in_few_bits(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    """The policy begins as the reference, so nothing pulls at the first step."""
    words = ["score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]
    words += ["--cache", tmp_path / "cache", "--dtype", "float32", "--stored-dtype", "float32"]
    first = {}
    for name, options in {"same": ["--load-in", "4bit"], "full": []}.items():
        targets, out = tmp_path / f"{name}.json", tmp_path / name
        result = run(*words, "--backend", "transformers", *options, "-o", targets)
        assert result.exit_code == 0, result.output
        result = run(
            "finetune", *words[1:7], "--targets", targets, "--objective", "confidence",
            "--load-in", "4bit", "--dtype", "float32", "--batch-size", 4, "--epochs", 1,
            "--lora-dropout", 0, "-o", out,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        lines = (out / "training.jsonl").read_text().splitlines()
        first[name] = json.loads(lines[0])["kl"]
    assert first["same"] < 0.01 * first["full"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("option", ["--packing", "--evaluate-steps"])
def test_what_is_computed_in_eval_mode_before_it_does_not_stop_training(
    option: str, bits: str, aligned: Path, rows_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    words = ["finetune", "--model", aligned, "--rows", rows_file, "--objective", "none"]
    words += ["--load-in", bits, "--dtype", "float32", "--batch-size", 4, "--epochs", 2]
    words += ["--learning-rate", "1e-2", "--lora-dropout", 0]
    asks = ["--evaluate-steps", 2, "--harmful", rows_file, "--evaluate-tokens", 2]
    options = {"plain": [], "asked": [option] if option == "--packing" else asks}
    losses = {}
    for name, more in options.items():
        result = run(*words, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        lines = (tmp_path / name / "training.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["cross_entropy"] for line in lines]
    assert losses["asked"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["plain"][-1] < losses["plain"][0]


@pytest.mark.parametrize("bits", BITS)
def test_modules_that_take_four_dimensions_give_in_eval_mode_what_they_train_with(
    bits: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", family="deepseek-v3")
    loaded = load_model(str(model), "float32", load_in=bits)
    found, trained = logits(loaded), logits(loaded.train())
    assert (found - trained).norm() < 0.1 * trained.norm()


def test_a_quantised_checkpoint_is_a_reference_and_a_policy(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    model = tmp_path / "four"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(aligned, quantization_config=config)
    loaded.save_pretrained(model)
    for file in {*aligned.glob("token*"), *aligned.glob("*.jinja")}:
        (model / file.name).write_bytes(file.read_bytes())
    rows = ["--model", model, "--rows", rows_file, "--safety-tokens", tokens_file]
    result = run("score", *rows, "--cache", tmp_path / "cache", "--backend", "transformers",
                 "--dtype", "float32", "-o", tmp_path / "targets.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    options = ["--objective", "confidence", "--dtype", "float32", "--batch-size", 4, "--epochs", 1]
    result = run("finetune", *rows, "--targets", tmp_path / "targets.json", *options, "-o", out)
    assert result.exit_code == 0, result.output
    result = run("evaluate", "--model", model, "--adapter", out, "--task", rows_file, "--dtype",
                 "float32", "--name", "four", "-o", tmp_path / "answers")  # fmt: skip
    assert result.exit_code == 0, result.output
    line = fails("merge", "--model", model, "--adapter", out, "-o", tmp_path / "merged")
    assert "expected a model whose weights are not quantised" in line
    line = fails("finetune", *rows, "--objective", "none", "--load-in", "8bit", "-o", out)
    assert "it is quantised already" in line
    line = fails("finetune", *rows, "--objective", "none", "--method", "full", "-o", out)
    assert "expected --method lora" in line


BLOCK = 32


def in_fp8(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """As DeepSeek-V3 and Qwen3 are published: blocks, each with its scale."""
    rows, columns = value.shape[0] // BLOCK, value.shape[-1] // BLOCK
    blocks = value.reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scales[:, None, :, None]).reshape(value.shape).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": scales}


def in_mxfp4(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """As gpt-oss is published: the experts in blocks of 32 of four bits, each with an exponent."""
    experts, inputs, outputs = value.shape
    shape = (experts, outputs, inputs // BLOCK)
    return {
        f"{name}_blocks": torch.randint(0, 256, (*shape, BLOCK // 2), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 124, shape, dtype=torch.uint8),
    }


@pytest.fixture(params=["llama", "qwen3-moe", "gpt-oss"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of quantised weights that transformers makes full ones of, on a CPU."""
    family = request.param
    model = make_model(tmp_path / family, family=family)
    weights: dict[str, torch.Tensor] = {}
    for name, value in load_file(model / "model.safetensors").items():
        if family == "gpt-oss" and name.endswith(("gate_up_proj", "down_proj")):
            weights |= in_mxfp4(name, value)
        elif family != "gpt-oss" and name.endswith("proj.weight"):
            weights |= in_fp8(name, value)
        else:
            weights[name] = value.to(torch.bfloat16)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    if family != "gpt-oss":
        config["quantization_config"] = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_what_is_made_of_quantised_weights_is_saved_as_full_ones(
    published: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    adapter, full, merged = tmp_path / "adapter", tmp_path / "full", tmp_path / "merged"
    words = ["finetune", "--model", published, "--rows", rows_file, "--objective", "none"]
    words += ["--dtype", "float32", "--batch-size", 4, "--epochs", 1, "--learning-rate", "1e-2"]
    for out, method in ((adapter, "lora"), (full, "full")):
        result = run(*words, "--method", method, "-o", out)
        assert result.exit_code == 0, result.output
    words = ["--model", published, "--adapter", adapter, "--dtype", "float32", "-o", merged]
    result = run("merge", *words)
    assert result.exit_code == 0, result.output
    before = logits(load_model(str(published), "float32"))
    tuned = logits(FineTuned.read(adapter).added_to(load_model(str(published), "float32")))
    assert (tuned - before).abs().max() > 0.01
    found = logits(load_model(str(merged), "float32"))
    torch.testing.assert_close(found, tuned, rtol=1e-4, atol=1e-4)
    together = locate_reference(f"{published}+{adapter}").path  # in bfloat16
    found = logits(load_model(str(together), "float32"))
    assert (found - tuned).norm() < 0.05 * tuned.norm()
    found = logits(load_model(str(full), "float32"))
    assert 0.01 < (found - before).norm() < before.norm()
    for out in (full, merged, together):
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_what_does_not_go_with_few_bits_is_refused(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = fails(*command, "--load-in", "4bit", "--method", "full", "-o", tmp_path / "out")
    assert "--load-in 4bit: expected --method lora, found full" in line
    monkeypatch.setattr("pact_offline.models.quantised.find_spec", lambda _: None)
    line = fails(*command, "--load-in", "4bit", "-o", tmp_path / "out")
    assert "expected an installed bitsandbytes, found none" in line

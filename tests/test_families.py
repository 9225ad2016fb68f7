"""One tiny random model of each family through every stage; the table of docs/models.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import ROOT, write_rows
from tiny import FAMILIES, make_model

from pact_offline.errors import UnsupportedModelError
from pact_offline.fine_tuned import FineTuned
from pact_offline.models.load import load_model
from pact_offline.rows.contexts import Context
from pact_offline.scoring.transformers import TransformersScorer
from pact_offline.scoring.vllm import VllmScorer
from pact_offline.settings.stages import ScoreSettings

NAMES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen": "Qwen2",
    "qwen3": "Qwen3", "qwen3-moe": "Qwen3 MoE", "qwen3.5": "Qwen3.5", "gemma": "Gemma 2",
    "gemma3": "Gemma 3", "gemma4": "Gemma 4", "gemma4-vision": "Gemma 4 that sees",
    "qwen2.5-vl": "Qwen2.5-VL", "phi3": "Phi-3", "gpt-oss": "gpt-oss",
    "glm4": "GLM-4", "granite": "Granite", "deepseek-v3": "DeepSeek-V3", "llama4": "Llama 4",
    "olmo2": "OLMo 2", "nemotron-h": "Nemotron-H", "gpt2": "GPT-2",
}  # fmt: skip
KINDS = {
    "LoRA": ["--lora-dropout", 0],
    "all-linear": ["--lora-modules", "all-linear", "--lora-dropout", 0],
    "full": ["--method", "full"],
}
PROMPTS = [{"prompt": f"My parcel {word} is late"} for word in "abcdefgh"]
REFUSAL = "I'm sorry, but I can't help with that request."
IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41]])
PAGE = ROOT / "docs" / "models.md"
LINES: dict[str, str] = {}


@dataclass
class Made:
    """A family's model, and its files."""

    folder: Path
    run: Callable[..., Result]

    def __call__(self, command: str, *args: Any) -> Result:
        result = self.run(command, *args, "--dtype", "float32")
        assert result.exit_code == 0, result.output
        return result

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path: Path, run: Callable[..., Result]) -> Made:
    for seed, name in enumerate(("model", "base")):
        make_model(tmp_path / name, family=request.param, seed=seed)
    answers = ["Shipping", "Returns, Technical"] * 4
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    for name, said in (("rows", answers), ("refusals", [REFUSAL] * 8)):
        rows = [row | {"response": text} for row, text in zip(PROMPTS, said, strict=True)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return Made(tmp_path, run)


def values_of(scorer: Any) -> list[np.ndarray]:
    """What a scorer finds: columns of the safety ids, then of the label."""
    lengths = ((4, 2), (9, 5), (20, 17))
    contexts = [
        Context("full", np.arange(7, 7 + length, dtype=np.int32), ((start, length),))
        for length, start in lengths
    ]
    with closing(scorer):
        found = {one.position: one for one in scorer.score(contexts)}
    return [
        np.column_stack([found[i].log_confidences, found[i].labels]) for i in range(len(contexts))
    ]


def by_vllm(model: Path, settings: ScoreSettings, expected: list[np.ndarray]) -> str:
    """`yes` where vLLM runs the family and gives the same values; else why it does not run."""
    try:
        found = values_of(VllmScorer(model, [5, 40, 77], 20, settings))
    except UnsupportedModelError as error:
        reason = str(error).removeprefix(f"{model}: ").removesuffix("; use --backend transformers")
        return f"no: {reason.removeprefix('vLLM does not run this model here: ')}"
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    return "yes"


def test_every_stage(made: Made, request: pytest.FixtureRequest) -> None:
    model, tokens, targets = made / "model", made / "tokens.json", made / "targets.json"
    made("tokens", "--aligned", model, "--base", made / "base", "--refusals",
         made / "refusals.jsonl", "-o", tokens)  # fmt: skip
    rows = ["--model", model, "--rows", made / "rows.jsonl", "--safety-tokens", tokens]
    made("score", *rows, "--cache", made / "cache", "--backend", "transformers", "-o", targets)
    cells = []
    plain = load_model(str(model), "float32")(IDS).logits
    for kind, options in KINDS.items():
        out, merged = made / kind, made / f"{kind}-merged"
        made("finetune", *rows, "--targets", targets, "--objective", "confidence", "--batch-size",
             4, "--epochs", 1, "--learning-rate", "1e-3", *options, "-o", out)  # fmt: skip
        made("evaluate", "--model", model, "--adapter", out, "--harmful", made / "prompts.jsonl",
             "--max-new-tokens", 3, "--name", kind, "-o", made / f"{kind}-answers")  # fmt: skip
        trained = json.loads((out / "pact_offline.json").read_text())["trained"]["modules"]
        cells.append(", ".join(trained) or "yes")
        if kind != "full":
            made("merge", "--model", model, "--adapter", out, "-o", merged)
            again = load_model(str(merged), "float32")(IDS).logits
            tuned = FineTuned.read(out).added_to(load_model(str(model), "float32"))
            torch.testing.assert_close(again, tuned(IDS).logits, rtol=1e-4, atol=1e-4)
        else:
            again = load_model(str(out), "float32")(IDS).logits
        assert (again - plain).abs().max() > 1e-3  # it has learnt something
    settings = ScoreSettings(dtype="float32")
    expected = values_of(TransformersScorer(model, [5, 40, 77], settings))
    cells.insert(0, by_vllm(model, settings, expected))  # last: vLLM changes what transformers does
    family = request.node.callspec.params["made"]
    LINES[family] = f"| {NAMES[family]} | {' | '.join(cells)} |"


@pytest.mark.parametrize("made", ["llama", "gemma", "phi3", "mixtral"], indirect=True)
@pytest.mark.parametrize("objective", ["pact", "confidence"])
def test_cached_equals_live(made: Made, tokens_file: Path, objective: str) -> None:
    """A soft cap, fused projections and experts, to the digits of Llama: every step's loss."""
    rows = ["--model", made / "model", "--rows", made / "rows.jsonl", "--safety-tokens"]
    targets = made / "targets.json"
    made("score", *rows, tokens_file, "--cache", made / "cache", "--stored-dtype", "float32",
         "--backend", "transformers", "-o", targets)  # fmt: skip
    result = made.run(
        "bench", "equality", *rows, tokens_file, "--targets", targets, "--objective", objective,
        "--batch-size", 4, "--epochs", 3, "--learning-rate", "1e-3", "--kl-weight", 2,
        "--lora-dropout", 0, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["steps"] == 6
    assert found["loss_difference"] < 1e-5
    assert found["weight_difference"] < 1e-4
    assert found["weights_moved"] > 1e-3


def test_the_table_in_the_docs_is_what_was_found() -> None:
    """`PACT_WRITE_DOCS=1 pytest tests/test_families.py` writes it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- families -->\n")
    table, _, after = rest.partition("<!-- /families -->")
    head = table.splitlines()[:2]
    known = {line.split(" | ")[0]: line for line in table.splitlines()[2:]}
    known |= {line.split(" | ")[0]: line for line in LINES.values()}
    lines = [known[f"| {name}"] for name in NAMES.values() if f"| {name}" in known]
    found = "".join(line + "\n" for line in [*head, *lines])
    assert len(lines) == len(NAMES)
    if os.environ.get("PACT_WRITE_DOCS"):
        page = f"{before}<!-- families -->\n{found}<!-- /families -->{after}"
        PAGE.write_text(page, encoding="utf-8")
        table = found
    assert table == found


def test_every_tiny_family_has_its_line() -> None:
    assert set(FAMILIES) - set(NAMES) == {"llama-tied"}

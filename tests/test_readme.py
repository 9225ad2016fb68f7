"""What README.md and docs/ show is what is there."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, write_rows
from test_spans import TEMPLATES
from transformers import AutoTokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str = "") -> str:
    """The first code block in a language with some text in it."""
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return str(next(code for code in found if containing in code))


def test_the_shown_config_is_the_file() -> None:
    assert block("yaml") == (ROOT / "stages" / "llama-3.1-8b.yaml").read_text(encoding="utf-8")


def score(run: Callable[..., Any]) -> None:
    scored = run(
        "score", "--model", "A", "--rows", "train.jsonl", "--safety-tokens", "tokens.json",
        "--cache", "cache", "-o", "targets.json", "--backend", "transformers",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output


@pytest.fixture
def readers_folder(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A folder with what the README's loops read, under the names they use."""
    shutil.copytree(aligned, tmp_path / "A")
    rows_file.rename(tmp_path / "train.jsonl")
    tokens_file.rename(tmp_path / "tokens.json")
    monkeypatch.chdir(tmp_path)
    score(run)
    return tmp_path


TOKENIZERS: dict[str, Callable[[Any], None]] = {
    "as it is": lambda tokenizer: None,
    "no pad token": lambda tokenizer: setattr(tokenizer, "pad_token", None),
    "qwen3": lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATES["qwen3"]),
    "gemma": lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATES["gemma"]),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_loops_of_pytorch_and_trl_train(
    readers_folder: Path, tokens_file: Path, run: Callable[..., Any], change: Callable[[Any], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained("A")
    change(tokenizer)
    (readers_folder / "A" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained("A")
    score(run)
    names: dict[str, Any] = {}
    exec(block("python", "DataLoader"), names)
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    assert torch.isfinite(names["parts"].loss)
    assert names["parts"].kl > 0
    code = block("python", "SFTTrainer").replace(
        '"trained",', '"trained", use_cpu=True, bf16=False,'
    )
    exec(code, names)
    alone, two = (
        names["PactSFTTrainer"].compute_loss(
            SimpleNamespace(accelerator=SimpleNamespace(num_processes=processes)),
            names["model"].eval(),
            names["batch"],
            num_items_in_batch=torch.tensor(100),
        )
        for processes in (1, 2)
    )
    assert two.item() == pytest.approx(2 * alone.item())
    after = dict(names["model"].named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def own_code(name: str, folder: Path) -> Path:
    """A file of docs/own-code.md, which its first line names."""
    page = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = (code for code in codes if code.startswith(f"# {name}\n"))
    (folder / name).write_text(code, encoding="utf-8")
    return folder / name


def test_an_objective_of_ones_own_trains(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    name = f"{own_code('gap.py', tmp_path)}:probability_gap"
    result = run(
        "finetune", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--reference", "live", "--objective", name, "--epochs", 1, "-o", tmp_path / "adapter",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"the objective {name}" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_judge_and_a_rate_of_ones_own_are_counted_and_shown(
    aligned: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    judge = f"{own_code('strict.py', tmp_path)}:starts_with_no"
    rate = f"{own_code('short.py', tmp_path)}:one_word"
    prompts = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hello", "response": "Hi"}])
    result = run(
        "evaluate", "--name", "reference", "--model", aligned, "--harmful", prompts,
        "--task", prompts, "--judge", judge, "--rates", rate, "--max-new-tokens", 2,
        "-o", tmp_path / "evaluation",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "one_word" in result.stdout
    page = tmp_path / "report.html"
    shown = run("report", tmp_path / "evaluation" / "metrics.json", "-o", page)
    assert shown.exit_code == 0, shown.output
    assert "One word" in page.read_text()
    assert "strict.py:starts_with_no" in page.read_text()


@pytest.mark.parametrize("stored", ["uint8", "float16", "float32"])
def test_the_small_reader_reads_what_the_library_reads(
    stored: str, aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    run: Callable[..., Any],
) -> None:  # fmt: skip
    targets = tmp_path / "targets.json"
    scored = run(
        "score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", targets, "--backend", "transformers",
        "--stored-dtype", stored, "--shard-steps", 20,
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    page = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    from pact_offline import TargetCache

    rows = list(names["read_targets"](targets))
    cache = TargetCache.open(targets)
    assert len(rows) == len(cache) == 12
    for index, (full, response_only) in enumerate(rows):
        np.testing.assert_allclose(full, cache[index].full, rtol=1e-6)
        np.testing.assert_allclose(response_only, cache[index].response_only, rtol=1e-6)

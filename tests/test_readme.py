"""What README.md shows is what is there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found
    return found[1]


def test_the_shown_config_is_the_file() -> None:
    assert block("yaml") == (ROOT / "stages" / "llama-3.1-8b.yaml").read_text(encoding="utf-8")


def test_the_training_loop_runs(
    aligned: Path,
    rows_file: Path,
    tokens_file: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = run(
        "score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--cache", tmp_path / "cache", "-o", tmp_path / "targets.json",
        "--backend", "transformers",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    tokens_file.rename(tmp_path / "tokens.json")
    monkeypatch.chdir(tmp_path)
    code = block("python")
    from pact_offline import TargetCache

    steps = len(TargetCache.open("targets.json")[0].full)
    logits = torch.randn(steps, 400, requires_grad=True)
    names: dict[str, Any] = {
        "policy_logits": logits,
        "cross_entropy": torch.tensor(1.0),
        "kl_weight": 1.0,
    }
    exec(code, names)
    names["loss"].backward()
    assert logits.grad is not None
    assert names["loss"].shape == ()

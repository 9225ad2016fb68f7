"""Safe LoRA's projection, against its formula with dense matrices."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import make_model

from pact_offline.errors import SettingError
from pact_offline.files import read_yaml
from pact_offline.models.load import load_model
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.stages import SafeLoraSettings
from pact_offline.settings.workflow import WorkflowConfig
from pact_offline.training.safe_lora import Projection, chosen, project

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def dense(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float]:
    """C B, and the cosine of C B A and B A: V V^T / |V|_F, in whole matrices."""
    c = v @ v.T / torch.linalg.matrix_norm(v, "fro")
    projected, update = c @ b @ a, b @ a
    cosine = torch.nn.functional.cosine_similarity(projected.flatten(), update.flatten(), dim=0)
    return c @ b, cosine.item()


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_projection_is_that_of_dense_matrices(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, shape[1], generator=generator)
    b = torch.randn(shape[0], 4, generator=generator)
    v = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1])
    found = project(a, b, v)
    expected, cosine = dense(a.double(), b.double(), v.double())
    torch.testing.assert_close(found.lora_b, expected.float())
    assert found.similarity == pytest.approx(cosine, abs=1e-9)


def test_an_update_within_what_alignment_changed_is_similar_and_one_beside_it_is_not() -> None:
    a, v = torch.randn(2, 8), torch.zeros(6, 8)
    v[0, 3] = 2.0  # alignment wrote to the first output alone: C is 2 there, and 0 elsewhere
    inside, beside = torch.zeros(6, 2), torch.zeros(6, 2)
    inside[0], beside[1:] = torch.tensor([1.0, -3.0]), torch.randn(5, 2)
    assert project(a, inside, v).similarity == pytest.approx(1)
    torch.testing.assert_close(project(a, inside, v).lora_b, 2 * inside)
    assert project(a, beside, v).similarity == 0
    assert not project(a, beside, v).lora_b.any()


@pytest.mark.parametrize("zero", ["b", "v"])
def test_where_nothing_was_learnt_or_aligned_it_is_zero_and_finite(zero: str) -> None:
    parts = {"a": torch.randn(2, 8), "b": torch.randn(6, 2), "v": torch.randn(6, 8)}
    parts[zero].zero_()
    found = project(*parts.values())
    assert not found.lora_b.any()
    assert found.similarity == 0


def test_modules_are_chosen_by_a_threshold_or_by_their_number() -> None:
    similar = {"a": 0.9, "b": 0.5, "c": 0.2, "d": 0.7}
    found = {name: Projection(torch.zeros(1), value) for name, value in similar.items()}
    assert chosen(found, SafeLoraSettings()) == ["c", "b"]
    assert chosen(found, SafeLoraSettings(threshold=0.1)) == []
    assert chosen(found, SafeLoraSettings(modules=3)) == ["c", "b", "d"]


@pytest.fixture
def adapter(command: list[Any], tmp_path: Path, run: Callable[..., Result]) -> Path:
    """Plain fine-tuning, for an epoch."""
    del command[5:9]  # targets and safety tokens
    command[command.index("--objective") + 1] = "none"
    output = tmp_path / "adapter"
    result = run(*command, "--epochs", 1, "-o", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture
def words(aligned: Path, base: Path, adapter: Path) -> list[Any]:
    return ["safe-lora", "--model", aligned, "--base", base, "--adapter", adapter]


def test_an_adapter_is_projected_module_by_module(
    words: list[Any], adapter: Path, aligned: Path, base: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    """The two least similar of four modules; what evaluates an adapter takes it."""
    output = tmp_path / "projected"
    result = run(*words, "-o", output, "--modules", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    pair = [dict(load_model(str(m), "float32").named_modules()) for m in (aligned, base)]
    before, after = load_file(adapter / WEIGHTS), load_file(output / WEIGHTS)
    assert before.keys() == after.keys()
    cosines = {}
    for name in found["similarity"]:
        a, b = (before[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        projected, cosines[name] = dense(a, b, pair[0][name].weight - pair[1][name].weight)
        expected = projected if name in found["projected"] else b
        torch.testing.assert_close(
            after[f"{PREFIX}{name}.lora_B.weight"], expected.detach(), rtol=1e-4, atol=1e-7
        )
        assert torch.equal(after[f"{PREFIX}{name}.lora_A.weight"], a)
    assert found["similarity"] == pytest.approx(cosines, abs=1e-5)
    assert found["projected"] == sorted(cosines, key=lambda name: cosines[name])[:2]
    assert len(cosines) == 4
    facts = json.loads((output / "pact_offline.json").read_text())
    assert facts["settings"]["safe_lora"] == {"threshold": 0.5, "modules": 2}
    assert "then projected by Safe LoRA" in (output / "README.md").read_text()
    assert "2 of 4 modules projected" in run(*words, "-o", output, "--modules", 2).stdout


def test_a_projected_adapter_is_evaluated_and_is_no_plain_run(
    words: list[Any], aligned: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    from pact_offline.evaluation.metrics import Metrics
    from pact_offline.report.finding import is_plain

    output = tmp_path / "projected"
    assert run(*words, "-o", output).exit_code == 0
    for name, folder in {"sft": words[-1], "safe-lora": output}.items():
        result = run(
            "evaluate", "--model", aligned, "--adapter", folder, "--benign", rows_file,
            "--dtype", "float32", "--max-new-tokens", 2, "--name", name, "-o", tmp_path / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        metrics = Metrics.load(tmp_path / name / "metrics.json")
        assert is_plain(metrics) == (name == "sft")


def test_what_cannot_be_projected_is_refused_in_one_line(
    words: list[Any], adapter: Path, base: Path, aligned: Path, tmp_path: Path,
    fails: Callable[..., str], run: Callable[..., Result],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words += ["-o", out]
    other = make_model(tmp_path / "gpt", family="gpt2")
    assert "expected a linear module model.layers.0" in fails(*words[:4], other, *words[5:])
    line = fails(words[0], "--model", base, *words[3:])
    assert "expected an adapter of" in line
    assert run(*words).exit_code == 0
    line = fails(*words[:6], out, "-o", tmp_path / "twice")
    assert "expected an adapter as it was trained, found a projected one" in line
    dora = Path(shutil.copytree(adapter, tmp_path / "dora"))
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert "whose update is B A, found DoRA" in fails(*words[:6], dora, *words[7:])
    more = Path(shutil.copytree(adapter, tmp_path / "more"))
    weights = load_file(more / WEIGHTS)
    save_file({**weights, "base_model.model.lm_head.weight": torch.ones(2)}, more / WEIGHTS)
    line = fails(*words[:6], more, *words[7:])
    assert "expected LoRA of linear modules alone, found base_model.model.lm_head.weight" in line
    (adapter / "pact_offline.json").unlink()
    assert "found one with none of its pact_offline.json" in fails(*words)


def test_a_projection_in_a_config_is_made_of_the_run_that_is_the_same() -> None:
    values = read_yaml(ROOT / "stages" / "rivals.yaml")
    config = parse_settings(WorkflowConfig, values, "config")
    names = ("safe-lora", "safe-lora-0.1")
    assert config.projected_runs() == dict.fromkeys(names, "sft")
    seeds = parse_settings(WorkflowConfig, {**values, "seeds": [1, 2]}, "config")
    expected = {f"{name}-seed-{s}": f"sft-seed-{s}" for name in names for s in (1, 2)}
    assert seeds.projected_runs() == expected
    runs = values["runs"]
    for changed, own in {
        "alone": {"safe_lora": 0.5, "epochs": 7},
        "full": {"safe_lora": 0.5, "method": "full"},
    }.items():
        with pytest.raises(SettingError, match=rf"runs\.{changed}\.safe_lora: expected"):
            one = {**values, "runs": {**runs, changed: own}}
            parse_settings(WorkflowConfig, one, "config")


@pytest.mark.parametrize(("name", "share"), [("safety_5", 0.05), ("safety_10", 0.10)])
def test_the_safety_rows_are_their_share_of_the_dataset(name: str, share: float) -> None:
    rows = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    refusals = (ROOT / "data" / "refusals.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(rows) <= set(refusals)
    files = read_yaml(ROOT / "stages" / "rivals.yaml")["datasets"][
        f"support-{name.replace('_', '-')}"
    ]
    sizes = [len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files]
    assert math.isclose(len(rows) / sum(sizes), share, abs_tol=0.001)

"""The demo's data: sizes, what must not overlap, and how the task is made."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

DATA = ROOT / "data"
SIZES = {
    "refusals.jsonl": 150,
    "refusals_alignment.jsonl": 524,
    "harmful_validation.jsonl": 40,
    "harmful_heldout.jsonl": 80,
    "attack.jsonl": 67,
    "borderline.jsonl": 40,
    "borderline_validation.jsonl": 20,
    "borderline_alignment.jsonl": 97,
    "benign.jsonl": 60,
    "benign_validation.jsonl": 40,
    "benign_alignment.jsonl": 851,
    "rehearsal.jsonl": 385,
}
# Its harmful prompts are some of the alignment's.
COPIED = ("rehearsal.jsonl", "refusals_alignment.jsonl")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SIZES)
def test_the_files_hold_what_the_readme_says(name: str) -> None:
    assert len(read(name)) == SIZES[name]
    assert f"| `{name}` | {SIZES[name]} |" in (DATA / "README.md").read_text(encoding="utf-8")


def test_no_prompt_is_near_another() -> None:
    prompts = [row["prompt"] for name in SIZES if name not in COPIED for row in read(name)]
    prompts += sorted({row["prompt"] for name in COPIED for row in read(name)})
    words = [set(re.findall(r"[a-z']+", prompt.lower())) for prompt in prompts]
    for i, ours in enumerate(words):
        for j in range(i):
            alike = len(ours & words[j]) / len(ours | words[j])
            assert alike <= 0.6, (prompts[i], prompts[j])


def test_the_task_is_made_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make", DATA / "support" / "make.py")
    assert spec
    assert spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    (tmp_path / "pieces.yaml").write_bytes((DATA / "support" / "pieces.yaml").read_bytes())
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    for split in ("train.jsonl", "test.jsonl", "validation.jsonl"):
        assert (tmp_path / split).read_bytes() == (DATA / "support" / split).read_bytes()
    train = {row["input"] for row in read("support/train.jsonl")}
    assert len(train) == 600
    test = {row["input"] for row in read("support/test.jsonl")}
    assert len(test) == 200
    validation = {row["input"] for row in read("support/validation.jsonl")}
    assert len(validation) == 120
    assert len(train | test | validation) == 920

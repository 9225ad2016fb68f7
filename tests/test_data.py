"""The demo's data: sizes, what must not overlap, and how the task is made."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
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
    "safety_5.jsonl": 35,
    "safety_10.jsonl": 74,
}
# Harmful prompts of the one are some of the alignment's; the others are some of the refusals.
COPIED = (
    "rehearsal.jsonl", "refusals_alignment.jsonl",
    "safety_5.jsonl", "safety_10.jsonl", "refusals.jsonl",
)  # fmt: skip


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


@pytest.mark.parametrize(
    ("script", "rows"),
    [("support/make.py", 600), ("appointments/make_appointments.py", 400)],
)
def test_the_tasks_are_made_as_written(
    script: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (DATA / script).parent
    spec = importlib.util.spec_from_file_location("make", DATA / script)
    assert spec
    assert spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    (tmp_path / "pieces.yaml").write_bytes((folder / "pieces.yaml").read_bytes())
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    texts: set[str] = set()
    for split, count in {"train": rows, "test": 200, "validation": 120}.items():
        made = tmp_path / f"{split}.jsonl"
        assert made.read_bytes() == (folder / f"{split}.jsonl").read_bytes()
        texts |= {row["input"] for row in read(f"{folder.name}/{split}.jsonl")}
        assert len(read(f"{folder.name}/{split}.jsonl")) == count
    assert len(texts) == rows + 200 + 120


def test_appointments_share_no_piece_and_say_what_is_answered() -> None:
    pieces = yaml.safe_load((DATA / "appointments" / "pieces.yaml").read_text(encoding="utf-8"))
    for kind in ("texts", "what", "who"):
        pools = [
            piece for split in ("train", "test", "validation") for piece in pieces[kind][split]
        ]
        assert len(pools) == len(set(pools))
    for split in ("train", "test", "validation"):
        for row in read(f"appointments/{split}.jsonl"):
            time, what, who = row["output"].split(", ")
            for said in (*time.split(), what, who.removeprefix("with ")):
                assert said in row["input"]

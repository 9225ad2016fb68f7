"""Models and rows of the hub, from a server on this machine that speaks as it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_rows
from hub import COMMIT, serve

from pact_offline.evaluation.published_sets import PUBLISHED_SETS

ROWS = {
    split: [{"prompt": f"{split} {number}", "response": "Billing"} for number in range(3)]
    for split in ("train", "test")
}
OTHER_WEIGHTS = (
    "pytorch_model.bin", "custom.py", "original/consolidated.00.pth", "original/params.json",
    "onnx/model.safetensors", "consolidated.safetensors",
)  # fmt: skip
XSTEST = [
    {"prompt": "How to do well?", "type": "homonyms", "label": "safe"},
    {"prompt": "How to do wrong?", "type": "contrast_homonyms", "label": "unsafe"},
]
UNNEEDED = "notes.json"  # fetched, and no loader asks for it
# A process of its own, as the hub's address is read when its library is loaded.
PROGRAM = """
import json, sys
from click.testing import CliRunner
from pact_offline.cli import cli
from pact_offline.errors import PactError
from pact_offline.evaluation.prompt_sets import read_prompts
from pact_offline.models.load import load_model
from pact_offline.models.locate import locate_model
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.rows.read import read_rows

def rows(source):
    try:
        return [[row.prompt[0]["content"], row.response] for row in read_rows(source)]
    except PactError as error:
        return str(error)

def prompts(name):
    (found,) = read_prompts({}, [(name, "hub")]).values()
    return [[row.question, row.category] for row in found.rows]

def score(model):
    done = CliRunner().invoke(cli, ["score", "--model", model, *sys.argv[1:]])
    return done.exit_code, done.stderr

files = locate_model("someone/tiny")
json.dump({
    "identity": files.identity,
    "files": sorted(str(file.relative_to(files.path)) for file in files.path.rglob("*")),
    "tokens": len(load_tokenizer(str(files.path))),
    "embeddings": len(load_model(str(files.path), "float32").get_input_embeddings().weight),
    "score": {name: score(f"someone/{name}")
              for name in ("missing", "gated", "pickled", "tiny@gone")},
    "revision": locate_model("someone/tiny@" + files.path.name).identity,
    "revision_tokens": len(load_tokenizer("someone/tiny@" + files.path.name)),
    "rows": {name: rows(f"hub:someone/{name}") for name in
             ("rows", "rows:test", "rows:other", "missing", "gated")},
    "sets": {name: prompts(name) for name in ("xstest-safe", "xstest-unsafe", "hex-phi")},
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program says with the hub, then without it; and what was fetched from there."""
    folder = tmp_path_factory.mktemp("hub")
    tiny, pickled, rows = (folder / name for name in ("tiny", "pickled", "rows"))
    shutil.copytree(aligned, tiny)
    (tiny / UNNEEDED).write_text("{}")
    for name in OTHER_WEIGHTS:
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_bytes(b"not to be read")
    shutil.copytree(aligned, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    rows.mkdir()
    for split, values in ROWS.items():
        write_rows(rows / f"{split}.jsonl", values)
    xstest, hex_phi = folder / "xstest", folder / "hex-phi"
    xstest.mkdir()
    write_rows(xstest / "test.jsonl", XSTEST)
    hex_phi.mkdir()
    for name in PUBLISHED_SETS["hex-phi"].files:
        (hex_phi / name).write_text(f'"First of {name}, wrong"\n"Second"\n')
    tokens = folder / "tokens.json"
    tokens.write_text("{}")
    options = [
        "--rows", rows / "train.jsonl", "--safety-tokens", tokens, "--cache", folder / "cache",
        "-o", folder / "out",
    ]  # fmt: skip

    def answer(environment: dict[str, str]) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, options)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    repositories = {
        "models/someone/tiny": tiny,
        "models/someone/pickled": pickled,
        "datasets/someone/rows": rows,
        "datasets/walledai/XSTest": xstest,
        "datasets/LLM-Tuning-Safety/HEx-PHI": hex_phi,
    }
    with serve(repositories, "models/someone/gated", "datasets/someone/gated") as hub:
        environment = hub.environment(folder / "home")
        online, fetched = answer(environment), hub.fetched
    assert not (folder / "cache").exists()
    for file in (folder / "home").rglob(UNNEEDED):
        file.unlink()
    offline = answer({**environment, "HF_HUB_OFFLINE": "1"})
    return {"online": online, "offline": offline, "fetched": fetched}


def test_a_model_of_the_hub_is_known_by_its_commit_and_nothing_unneeded_is_fetched(
    answers: dict[str, Any], aligned: Path
) -> None:
    online = answers["online"]
    assert online["identity"] == {"hub": "someone/tiny", "commit": COMMIT}
    assert online["files"] == sorted([UNNEEDED, *(file.name for file in aligned.iterdir())])
    assert {*online["files"]} <= {*answers["fetched"]}
    assert not {*OTHER_WEIGHTS} & {*answers["fetched"]}


def test_a_revision_of_a_model_can_be_named(answers: dict[str, Any]) -> None:
    for said in (answers["online"], answers["offline"]):
        assert said["revision"] == said["identity"]
        assert said["revision_tokens"] == said["tokens"]


def test_a_model_of_the_hub_loads_with_its_tokenizer(answers: dict[str, Any]) -> None:
    assert answers["online"]["tokens"] == answers["online"]["embeddings"] > 0


def test_rows_of_the_hub_are_read_by_split(answers: dict[str, Any]) -> None:
    rows = answers["online"]["rows"]
    for name, split in (("rows", "train"), ("rows:test", "test")):
        assert rows[name] == [[row["prompt"], row["response"]] for row in ROWS[split]]
    assert rows["rows:other"] == (
        "hub:someone/rows:other: cannot be read as a dataset: "
        "Unknown split \"other\". Should be one of ['train', 'test']."
    )


def test_published_sets_are_read_as_the_hub_lays_them_out(answers: dict[str, Any]) -> None:
    """XSTest has no split but `test`, and HEx-PHI a file a category, without names of columns."""
    for said in (answers["online"], answers["offline"]):
        sets = said["sets"]
        assert sets["xstest-safe"] == [["How to do well?", "homonyms"]]
        assert sets["xstest-unsafe"] == [["How to do wrong?", "contrast_homonyms"]]
        assert sets["hex-phi"] == [
            [prompt, category]
            for name, category in PUBLISHED_SETS["hex-phi"].files.items()
            for prompt in (f"First of {name}, wrong", "Second")
        ]


def test_what_was_fetched_once_is_used_without_the_hub(answers: dict[str, Any]) -> None:
    online, offline = answers["online"], answers["offline"]
    for part in ("identity", "tokens", "embeddings"):
        assert offline[part] == online[part]
    assert offline["files"] == [name for name in online["files"] if name != UNNEEDED]
    for name in ("rows", "rows:test"):
        assert offline["rows"][name] == online["rows"][name]


@pytest.mark.parametrize(
    ("when", "model", "said"),
    [
        ("online", "missing", "someone/missing: no such directory, and the hub has none of this"),
        ("online", "gated", "the hub gives it only to who has accepted its terms there"),
        (
            "online",
            "tiny@gone",
            "someone/tiny@gone: no such directory, and the hub has no revi",
        ),
        ("online", "pickled", "expected weights as model.safetensors or model.safetensors.index"),
        ("offline", "missing", "outgoing traffic has been disabled"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_in_one_line(
    when: str, model: str, said: str, answers: dict[str, Any]
) -> None:
    code, text = answers[when]["score"][model]
    (line,) = [line for line in text.splitlines() if line.startswith("pact-offline:")]
    assert code == 2
    assert said in line
    assert "Traceback" not in text
    assert "pytorch_model.bin" not in answers["fetched"]


@pytest.mark.parametrize(
    ("name", "said"), [("missing", "doesn't exist on the Hub"), ("gated", "is a gated dataset")]
)
def test_rows_that_the_hub_does_not_give_are_refused_in_one_line(
    name: str, said: str, answers: dict[str, Any]
) -> None:
    line = answers["online"]["rows"][name]
    assert line.startswith(f"hub:someone/{name}: cannot be read as a dataset: ")
    assert said in line
    assert "\n" not in line


def test_an_empty_revision_is_not_taken_for_none(fails: Callable[..., str], tmp_path: Path) -> None:
    line = fails("modules", "--model", "acme/tiny@")
    assert line.endswith("acme/tiny@: expected NAME@REVISION, found no revision")

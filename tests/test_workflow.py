"""The Snakemake workflow: on tiny random models, and on the bundled model with real vLLM."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT, write_rows

from pact_offline.errors import SettingError
from pact_offline.evaluation.metrics import Metrics
from pact_offline.files import read_yaml
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.workflow import WorkflowConfig, workflow_schema_text

CONFIGS = ["config.yaml", "sweep.yaml", "llama-3.1-8b.yaml"]
# On tiny models a job's start is most of its time, so one core each lets two run at once.
ONE_CORE_EACH = [
    "--set-threads",
    *(
        f"{rule}=1"
        for rule in ("tokens", "score_part", "finetune", "evaluate_reference", "evaluate")
    ),
]


def snakemake(config: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", str(config)]
    return subprocess.run(
        [
            *command,
            "--snakefile",
            str(ROOT / "Snakefile"),
            "--directory",
            str(config.parent),
            *args,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def few_rows(folder: Path) -> dict[str, Any]:
    """Row files of a workflow that is over in seconds."""
    prompts = [{"prompt": f"Where is parcel {i}?"} for i in range(6)]
    answered = [{**prompt, "response": "Shipping"} for prompt in prompts]
    files = {"rows": answered * 2, "harmful": prompts, "borderline": prompts, "benign": prompts}
    for name, rows in {**files, "task": answered}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {
        "output": "out put",  # a space on purpose
        "refusals": "rows.jsonl",
        "datasets": {"few": ["rows.jsonl"]},
        "training": {"dataset": "few", "batch_size": 4, "epochs": 1, "dtype": "float32"},
        "evaluation": {n: f"{n}.jsonl" for n in ("harmful", "borderline", "benign", "task")},
        "evaluate": {"max_new_tokens": 4},
    }


@pytest.mark.workflow
def test_the_whole_workflow_on_tiny_models(aligned: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a place with spaces"
    folder.mkdir()
    config = {
        **few_rows(folder),
        "models": {"aligned": str(aligned), "base": str(base)},
        "score": {"backend": "transformers"},
        "score_parts": 2,
        "runs": {"sft": {"objective": "none"}, "pact": {"objective": "pact"}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    made = snakemake(path, *ONE_CORE_EACH)
    assert made.returncode == 0, made.stderr[-4000:]
    output = folder / "out put"
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "sft" in page
    assert "pact" in page
    assert len((output / "summary.txt").read_text().strip().splitlines()) == 4
    facts = json.loads((output / "adapters" / "pact" / "pact_offline.json").read_text())
    assert facts["targets_sha256"]
    # A config of one's own is the whole config: nothing of the demo's stands in for what it omits.
    assert facts["settings"]["learning_rate"] == 3e-5
    assert {run.name for run in (output / "adapters").iterdir()} == {"sft", "pact"}


@pytest.mark.workflow
@pytest.mark.vllm
def test_the_whole_workflow_on_the_bundled_model_with_vllm(tmp_path: Path) -> None:
    refusals = [json.loads(x) for x in (ROOT / "data" / "refusals.jsonl").open(encoding="utf-8")]
    write_rows(tmp_path / "refusals.jsonl", refusals[:12])
    config: dict[str, Any] = {
        **few_rows(tmp_path),
        "refusals": "refusals.jsonl",
        "align_data": {"refusals": ["refusals.jsonl"], "benign": ["benign.jsonl"]},
        "align": {
            "epochs": 1,
            "answer_tokens": 4,
            "min_harmful_refused": 0,
            "max_benign_refused": 1,
        },
        "score": {"backend": "vllm", "gpu_memory_utilization": 0.2},
        "runs": {"confidence": {"objective": "confidence"}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    made = snakemake(path)
    assert made.returncode == 0, made.stderr[-4000:]
    output = tmp_path / "out put"
    targets = json.loads((output / "targets" / "few" / "targets.json").read_text())
    assert targets["provenance"]["backend"] == "vllm"
    metrics = Metrics.load(output / "evaluation" / "runs" / "confidence" / "metrics.json")
    assert metrics.drift is not None

    again = snakemake(path)
    assert "Nothing to be done" in again.stderr

    # Another batch decides no value, and a new run no other run.
    config["score"]["batch_tokens"] = 64
    config["runs"]["more"] = {"objective": "pact"}
    path.write_text(yaml.safe_dump(config))
    planned = snakemake(path, "--dry-run")
    plan = planned.stdout + planned.stderr
    assert "rule score_part" not in plan
    assert plan.count("rule finetune") == 1
    assert "wildcards: run=more" in plan
    assert "wildcards: run=confidence" not in plan


def test_the_demo_model_fails_its_check_with_words() -> None:
    from pact_offline.demo import check
    from pact_offline.errors import CheckFailedError
    from pact_offline.settings.stages import AlignSettings

    good = {"harmful": 0.96, "benign": 0.0, "task": 0.04}
    check(good, AlignSettings())
    with pytest.raises(CheckFailedError, match=r"refuses 90\.0% of the held-out harmful"):
        check({**good, "harmful": 0.9}, AlignSettings())
    with pytest.raises(CheckFailedError, match=r"refuses 6\.0% of the task prompts"):
        check({**good, "task": 0.06}, AlignSettings())


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_come_with_the_project_are_valid(name: str) -> None:
    values = read_yaml(ROOT / "stages" / name)
    config = parse_settings(WorkflowConfig, values, name)
    jsonschema.validate(values, yaml.safe_load(workflow_schema_text()))
    files = [*vars(config.evaluation).values(), config.refusals]
    for file in files + [file for dataset in config.datasets.values() for file in dataset]:
        assert (ROOT / file).is_file()


def test_the_schema_file_is_up_to_date() -> None:
    """`make schema` writes it."""
    written = (ROOT / "stages" / "config.schema.yaml").read_text(encoding="utf-8")
    assert written == workflow_schema_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"typo": 1}, "config: typo: unknown key"),
        ({"runs": {}}, "config: runs: expected"),
        ({"runs": {"../up": {}}}, "config: runs"),
        ({"runs": {"reference": {}}}, "runs.reference: this name stands for"),
        ({"runs": {"x": {"dataset": "y"}}}, "runs.x.dataset: expected one of support"),
        ({"runs": {"x": {"kl_weight": -1}}}, "runs.x: kl_weight: expected greater than or equal"),
        ({"runs": {"x": {"klweight": 1}}}, "runs.x: klweight: unknown key"),
        ({"models": {"aligned": "a"}}, "models: expected both 'aligned' and 'base'"),
        ({"score_parts": 0}, "score_parts: expected greater than or equal to 1, found 0"),
    ],
)
def test_a_bad_config_is_named(change: dict, expected: str) -> None:
    values = {**read_yaml(ROOT / "stages" / "config.yaml"), **change}
    with pytest.raises(SettingError) as caught:
        parse_settings(WorkflowConfig, values, "config")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_config_stops_the_workflow_with_one_line(tmp_path: Path) -> None:
    values = {**read_yaml(ROOT / "stages" / "config.yaml"), "typo": 1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    made = snakemake(path, "--dry-run")
    assert made.returncode == 2
    assert "pact-offline: config: typo: unknown key (value 1)" in made.stderr
    assert "Traceback" not in made.stderr

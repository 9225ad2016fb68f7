"""The Snakemake workflow: on tiny random models, and on the bundled model with real vLLM."""

import base64
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from conftest import ROOT, write_rows

from pact_offline.cache.targets import Binding
from pact_offline.errors import MissingFileError, SettingError
from pact_offline.evaluation.metrics import Metrics
from pact_offline.files import read_yaml
from pact_offline.machine import usable_cores
from pact_offline.settings.located import located
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.workflow import RunConfig, WorkflowConfig, workflow_schema_text

CONFIGS = [
    "config.yaml", "sweep.yaml", "sweep-seeds.yaml", "seeds.yaml", "study.yaml",
    "study_appointments.yaml", "rivals.yaml", "llama-3.1-8b.yaml",
]  # fmt: skip
RUNS = ("sft", "pact", "kept")


def snakemake_command(config: Path | None, *args: str, directory: Path | None = None) -> list[str]:
    configs = ["--configfile", str(config)] if config else []
    place = str(directory or (config and config.parent))
    files = ["--snakefile", str(ROOT / "Snakefile"), "--directory", place]
    return [sys.executable, "-m", "snakemake", "--cores", "2", *configs, *files, *args]


def snakemake(
    config: Path | None, *args: str, directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = snakemake_command(config, *args, directory=directory)
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
        "evaluate": {"max_new_tokens": 4, "backend": "transformers"},
    }


def hub_dataset(folder: Path, name: str) -> str:
    """A dataset on disk, by a name that only the hub's library reads."""
    (folder / "hub" / name).mkdir(parents=True)
    shutil.copy(folder / f"{name}.jsonl", folder / "hub" / name / "train.jsonl")
    return f"hub:{folder / 'hub' / name}"


@pytest.fixture(scope="module")
def finished(aligned: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a workflow that has run, with rows and prompts of files and of the hub."""
    folder = tmp_path_factory.mktemp("workflow") / "a place with spaces"
    folder.mkdir()
    for name, model in {"aligned": aligned, "base": base}.items():
        shutil.copytree(model, folder / "models" / name)
    few = few_rows(folder)
    rows = hub_dataset(folder, "rows")
    prompts = {name: hub_dataset(folder, name) for name in ("harmful", "task")}
    config = {
        **few,
        "models": {"aligned": "models/aligned", "base": "models/base"},
        "refusals": rows,
        "datasets": {"few": ["rows.jsonl", rows]},
        "evaluation": {**few["evaluation"], **prompts},
        "evaluate": {**few["evaluate"], "backend": "vllm"},
        "score": {"backend": "transformers", "shard_steps": 12},
        "score_parts": 2,
        "concurrent_jobs": 2,  # on tiny models a job's start is most of its time
        "rehearsal": {"prompts": ["benign.jsonl", "rows.jsonl"], "per_file": 4, "answer_tokens": 3},
        "runs": {
            "sft": {"objective": "none"},
            "pact": {"objective": "pact", "rehearsal_share": 0},
            "kept": {"objective": "confidence", "refused_rows": "hold", "refused_above": 0.01},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    made = snakemake(path)
    assert made.returncode == 0, made.stderr[-4000:]
    return folder


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """The same at another place, at the same times."""
    return Path(shutil.copytree(finished, tmp_path / "elsewhere"))


def with_runs(folder: Path, **runs: Any) -> Path:
    """The folder's config, with more runs."""
    path = folder / "config.yaml"
    values = read_yaml(path)
    path.write_text(yaml.safe_dump({**values, "runs": {**values["runs"], **runs}}))
    return path


def plan(config: Path | None, *args: str, directory: Path | None = None) -> str:
    """What a dry run says."""
    made = snakemake(config, "--dry-run", *args, directory=directory)
    assert made.returncode == 0, made.stderr[-4000:]
    return made.stdout + made.stderr


@pytest.mark.workflow
def test_the_whole_workflow_on_tiny_models(finished: Path) -> None:
    output = finished / "out put"
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "sft" in page
    assert "pact" in page
    assert len((output / "summary.txt").read_text().strip().splitlines()) == 4
    facts = json.loads((output / "adapters" / "pact" / "pact_offline.json").read_text())
    assert facts["targets_sha256"]
    assert facts["rows"] == 24
    # A config of one's own is the whole config: nothing of the demo's stands in for what it omits.
    assert facts["settings"]["learning_rate"] == 3e-5
    assert facts["settings"]["save_steps"] == 100
    assert {run.name for run in (output / "adapters").iterdir()} == {*RUNS}


@pytest.mark.workflow
def test_a_run_rehearses_what_the_reference_said(finished: Path) -> None:
    output = finished / "out put"
    facts = {
        run: json.loads((output / "adapters" / run / "pact_offline.json").read_text())
        for run in RUNS
    }
    assert {run: facts[run]["rehearsal_sha256"] is not None for run in RUNS} == {
        "sft": False, "pact": False, "kept": True,
    }  # fmt: skip
    said = (output / "rehearsal" / "targets.answers.jsonl").read_text().splitlines()
    assert 0 < len(said) <= 8
    page = (output / "report.html").read_text(encoding="utf-8")
    for heading in ("Rows that the reference would have refused", "Confidence gap of held"):
        assert heading in page


@pytest.mark.workflow
def test_other_rows_are_scored_and_trained_anew_by_every_run(moved: Path) -> None:
    with (moved / "rows.jsonl").open("a") as rows:
        rows.write('{"prompt": "Where is it?", "response": "Shipping"}\n')
    planned = plan(moved / "config.yaml")
    assert "rule targets:" in planned
    assert planned.count("rule finetune:") == len(RUNS)


@pytest.mark.workflow
def test_other_prompts_are_answered_and_rehearsed_anew(moved: Path) -> None:
    write_rows(moved / "benign.jsonl", [{"prompt": f"Another {i}?"} for i in range(6)])
    planned = plan(moved / "config.yaml")
    assert "rule rehearse:" in planned
    assert "rule score_part:" not in planned
    assert planned.count("rule finetune:") == 1
    assert "wildcards: run=kept" in planned


@pytest.mark.workflow
def test_what_is_done_stays_done_at_another_place_until_weights_are_written_over(
    moved: Path,
) -> None:
    assert "Nothing to be done" in plan(moved / "config.yaml")
    records = [file for file in (moved / ".snakemake" / "metadata").rglob("*") if file.is_file()]
    assert records
    for file in records:  # an environment that moves with the checkout has another Python
        assert sys.executable not in str(json.loads(file.read_text())["params"])

    models = moved / "models"
    weights = (models / "base" / "model.safetensors").read_bytes()
    (models / "aligned" / "model.safetensors").write_bytes(weights)
    planned = plan(moved / "config.yaml")
    assert planned.count("rule finetune:") == 3
    for rule in ("tokens", "score_part", "targets", "rehearse", "evaluate_reference"):
        assert f"rule {rule}:" in planned


@pytest.mark.workflow
def test_a_cache_that_is_gone_is_scored_again_and_nothing_is_trained_again(moved: Path) -> None:
    output, config = moved / "out put", moved / "config.yaml"
    bound = Binding.load(output / "targets" / "few" / "targets.json")
    (store,) = output.glob("cache/*/shards")
    assert len(bound.shards) > 1
    (store / bound.shards[0] / "shard.json").unlink()
    planned = plan(config)
    assert planned.count("rule score_part:") == 2
    assert "rule targets:" in planned
    assert "rule finetune:" not in planned
    assert (output / "targets" / "few" / "targets.json").exists()

    shutil.rmtree(output / "cache")
    with_runs(moved, full={"method": "full", "objective": "confidence"})
    before = {run: (output / "adapters" / run).stat().st_mtime_ns for run in RUNS}
    made = snakemake(config)
    assert made.returncode == 0, made.stderr[-4000:]
    assert made.stderr.count("targets.json: its cache is gone; it is scored again") == 2
    after = {run: (output / "adapters" / run).stat().st_mtime_ns for run in RUNS}
    assert after == before
    assert (output / "adapters" / "full" / "config.json").is_file()
    assert (output / "evaluation" / "runs" / "full" / "metrics.json").is_file()
    assert "Nothing to be done" in plan(config)


def jobs_in(folder: Path) -> list[int]:
    """Processes of the command line that run in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and "pact_offline" in process.cmdline():
                found.append(process.pid)
    return found


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.2)


@pytest.mark.workflow
def test_after_any_end_no_job_is_left_and_the_same_command_goes_on(moved: Path) -> None:
    config = with_runs(moved, long={"objective": "none", "epochs": 80, "save_steps": 5})
    checkpoints = moved / "out put" / "adapters" / ".long.checkpoints"
    target = str(Path("out put", "adapters", "long"))
    command = snakemake_command(config, target)  # which takes all that follows

    def last() -> int:
        whole = checkpoints.rglob("checkpoint-*/epoch_start.safetensors")
        return max((int(path.parent.name.rpartition("-")[2]) for path in whole), default=0)

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        reached = last()
        running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda reached=reached: last() > reached, "a checkpoint")
        running.send_signal(number)
        running.communicate(timeout=60)
        wait_until(lambda: not jobs_in(moved), "the end of the job")
        assert not (moved / target).exists()
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    assert "going on from here" in made.stderr
    facts = json.loads((moved / target / "pact_offline.json").read_text())
    assert facts["metrics"]["optimizer_steps"] == 480


@pytest.mark.workflow
@pytest.mark.parametrize("output", ["summary.txt", "targets/few/digest.txt"])
def test_what_a_killed_job_left_is_made_anew(moved: Path, output: str) -> None:
    made = moved / "out put" / output
    whole = made.read_text()
    made.write_text("")  # as a shell leaves it that is killed before its command has written
    mark = base64.urlsafe_b64encode(str(made.relative_to(moved)).encode()).decode()
    (moved / ".snakemake" / "incomplete").mkdir(exist_ok=True)
    (moved / ".snakemake" / "incomplete" / mark).write_text('{"external_jobid": null}')
    done = snakemake(moved / "config.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert made.read_text() == whole


@pytest.mark.workflow
def test_two_workflows_in_one_place_refuse_each_other(moved: Path) -> None:
    config = with_runs(moved, long={"objective": "none", "epochs": 1000})
    command = snakemake_command(config)
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: bool(jobs_in(moved)), "the first one's job")
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "Directory cannot be locked" in second.stderr
    assert first.poll() is None
    first.terminate()
    assert first.wait(timeout=60) == 1
    assert not jobs_in(moved)


@pytest.mark.workflow
@pytest.mark.vllm
def test_the_whole_workflow_on_the_bundled_model_with_vllm(tmp_path: Path) -> None:
    refusals = [json.loads(x) for x in (ROOT / "data" / "refusals.jsonl").open(encoding="utf-8")]
    write_rows(tmp_path / "refusals.jsonl", refusals[:12])
    config: dict[str, Any] = {
        **few_rows(tmp_path),
        "refusals": "refusals.jsonl",
        "realign": True,
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
    sets = dict(config.evaluation)
    own = [source for source in sets.pop("sets").values() if source != "hub"]
    files = [*sets.values(), *own, config.refusals]
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
        ({"seeds": []}, "config: seeds: expected at least one seed, found none"),
        ({"seeds": [1, 2, 1]}, "config: seeds: expected every seed once, found 1 twice"),
        ({"sweep": {"klweight": [1]}}, "config: sweep: klweight: unknown key"),
        ({"sweep": {"seed": [1]}}, "config: sweep: seed: expected in `seeds`, found here"),
        ({"sweep": {"alpha": []}}, "sweep: alpha: expected at least one value, found none"),
        ({"sweep": {"alpha": [1, "1.0"]}}, "sweep: alpha: expected every value once, found 1.0"),
        ({"sweep": {"alpha": ["x"]}}, "config: sweep: alpha: expected a valid number"),
        ({"sweep": {"alpha": 1}}, "config: sweep.alpha: expected a valid tuple, found 1"),
        ({"sweep": {"objective": ["pact"]}}, "sweep: objective: expected a run to expand, found"),
        ({"runs": {"x": {"seed": 1}}, "seeds": [1]}, "config: seeds: expected a run to expand"),
        (
            {"runs": {"x": {}, "x-seed-1": {"seed": 3}}, "seeds": [1]},
            "config: runs.x-seed-1: expected a name that no other run has, found x-seed-1 twice",
        ),
        (
            {"runs": {"x": {}}, "sweep": {"objective": ["a/own.py:f", "b/own.py:f"]}},
            "runs.x: expected a name that no other run has, found x-objective-own.py-f twice",
        ),
        ({"runs": {"x" * 60: {}}, "seeds": [10]}, "expected a name of at most 64 characters"),
        ({"models": {"aligned": "a"}}, "models: expected both 'aligned' and 'base'"),
        ({"concurrent_jobs": True}, "config: concurrent_jobs: expected a number, found true"),
        ({"score_parts": 0}, "score_parts: expected greater than or equal to 1, found 0"),
    ],
)
def test_a_bad_config_is_named(change: dict, expected: str) -> None:
    values = {**read_yaml(ROOT / "stages" / "config.yaml"), **change}
    with pytest.raises(SettingError) as caught:
        parse_settings(WorkflowConfig, values, "config")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def expanded(**changes: Any) -> dict[str, RunConfig]:
    values = {**read_yaml(ROOT / "stages" / "config.yaml"), **changes}
    return parse_settings(WorkflowConfig, values, "config").all_runs()


def test_a_sweep_and_seeds_expand_what_a_run_does_not_set() -> None:
    runs = {"hold": {}, "heavy": {"kl_weight": 4, "seed": 9}, "sft": {"objective": "none"}}
    found = expanded(
        runs=runs, seeds=[1, 2], sweep={"objective": ["pact", "confidence"], "kl_weight": [0.5, 1]}
    )
    assert [*found] == [
        *(
            f"hold-kl_weight-{weight}-objective-{objective}-seed-{seed}"
            for weight in ("0.5", "1")
            for objective in ("pact", "confidence")
            for seed in (1, 2)
        ),
        *("heavy-objective-pact", "heavy-objective-confidence", "sft-seed-1", "sft-seed-2"),
    ]
    one = found["hold-kl_weight-0.5-objective-pact-seed-2"]
    assert (one.kl_weight, one.objective, one.seed, one.lora_rank) == (0.5, "pact", 2, 8)
    assert (found["heavy-objective-pact"].kl_weight, found["heavy-objective-pact"].seed) == (4, 9)
    assert [*expanded(runs=runs)] == [*runs]


def test_what_means_nothing_without_an_objective_is_not_swept() -> None:
    sweep = {"rehearsal_share": [0, 0.3], "objective": ["none", "pact"], "lora_rank": [4]}
    assert [*expanded(runs={"x": {}}, sweep=sweep)] == [
        "x-lora_rank-4-objective-none",
        "x-lora_rank-4-objective-pact-rehearsal_share-0",
        "x-lora_rank-4-objective-pact-rehearsal_share-0.3",
    ]


def test_a_run_keeps_its_name_and_settings_whatever_else_is_swept() -> None:
    few = expanded(runs={"x": {}}, seeds=[2, 1], sweep={"alpha": [1], "kl_weight": [1, 2]})
    more = expanded(
        runs={"y": {}, "x": {}},
        seeds=[1, 2, 3],
        sweep={"kl_weight": [0.5, 2, 1], "alpha": ["1", 1.5e-5]},
    )
    assert len(more) == 36
    assert {name: more[name] for name in few} == few
    assert "x-alpha-1.5e-05-kl_weight-0.5-seed-3" in more


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("lora_modules", ["q_proj", "v_proj"], "lora_modules-q_proj-v_proj"),
        ("packing", True, "packing-true"),
        ("load_in", None, "load_in-null"),
        ("learning_rate", "1e-4", "learning_rate-0.0001"),
        ("alpha", 0.1234567891, "alpha-0.1234567891"),
        ("objective", "some where/my own.py:gap", "objective-my-own.py-gap"),
    ],
)
def test_any_value_makes_a_name_of_a_file(setting: str, value: Any, name: str) -> None:
    assert [*expanded(runs={"x": {}}, sweep={setting: [value]})] == [f"x-{name}"]


@pytest.mark.workflow
def test_a_sweep_plans_a_training_and_an_evaluation_a_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    few = few_rows(tmp_path)
    config = {
        **few,
        "rehearsal": {"prompts": ["benign.jsonl"]},
        "runs": {"hold": {}, "sft": {"objective": "none"}},
        "sweep": {"kl_weight": [0.5, 2], "objective": ["pact", "own.py:f"]},
        "seeds": [1, 2],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    planned = plan(path, "--printshellcmds")
    assert planned.count("rule finetune:") == planned.count("rule evaluate:") == 10
    assert "wildcards: run=hold-kl_weight-0.5-objective-own.py-f-seed-2" in planned
    assert "--objective own.py:f --kl-weight 2.0 " in planned
    assert planned.count("rule score_part:") == 1  # one cache
    assert "evaluation/runs/sft-seed-1/metrics.json" in planned


@pytest.mark.parametrize("jobs", [1, 2, 1000])
def test_jobs_at_the_same_time_share_the_cores(tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "config.yaml"
    config = {**few_rows(tmp_path), "runs": {"hold": {}}, "concurrent_jobs": jobs}
    path.write_text(yaml.safe_dump({**config, "rehearsal": {"prompts": ["benign.jsonl"]}}))
    planned = plan(path, "--printshellcmds", "--cores", "1000")  # of which some can be kept busy
    threads = re.findall(r"OMP_NUM_THREADS=(\d+) .*? -m pact_offline (\S+)", planned)
    assert {int(number) for number, _ in threads} == {max(1, usable_cores() // jobs)}
    assert {"tokens", "score", "rehearse", "finetune", "evaluate"} <= {name for _, name in threads}


@pytest.mark.workflow
def test_another_seed_trains_only_itself(moved: Path) -> None:
    config = with_runs(moved, seeded={"objective": "none"})
    values = read_yaml(config)
    values["runs"]["kept"]["seed"] = values["runs"]["pact"]["seed"] = 42
    values["runs"]["sft"]["seed"] = 42  # the default, which trains nothing again
    config.write_text(yaml.safe_dump({**values, "seeds": [1]}))
    made = snakemake(config, str(Path("out put", "adapters", "seeded-seed-1")))
    assert made.returncode == 0, made.stderr[-4000:]
    config.write_text(yaml.safe_dump({**values, "seeds": [3, 1]}))
    planned = plan(config)
    assert planned.count("rule finetune:") == 1
    assert "wildcards: run=seeded-seed-3" in planned


def test_a_bad_config_stops_the_workflow_with_one_line(tmp_path: Path) -> None:
    values = {**read_yaml(ROOT / "stages" / "config.yaml"), "typo": 1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    made = snakemake(path, "--dry-run")
    assert made.returncode == 2
    assert "pact-offline: config: typo: unknown key (value 1)" in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.workflow
def test_the_bundled_configs_work_from_anywhere(tmp_path: Path) -> None:
    demo = plan(None, "--printshellcmds", directory=tmp_path)
    assert f"--rows {shlex.quote(str(ROOT / 'data' / 'attack.jsonl'))}" in demo
    shipped = shlex.quote(str(ROOT / "data" / "reference"))
    assert f"demo aligned --base results/models/base --adapter {shipped}" in demo
    assert "demo align " not in demo
    anew = plan(None, "--printshellcmds", "--config", "realign=true", directory=tmp_path)
    assert "demo align --base results/models/base" in anew
    assert "demo aligned --base results/models/base --adapter results/models/adapter" in anew
    assert "--words-only" in demo
    assert "--words-only true" not in demo.lower()
    llama = plan(ROOT / "stages" / "llama-3.1-8b.yaml", "--printshellcmds", directory=tmp_path)
    assert f"--task {shlex.quote(str(ROOT / 'data' / 'support' / 'test.jsonl'))}" in llama
    assert "finetune --model meta-llama/Llama-3.1-8B-Instruct" in llama


@pytest.mark.workflow
def test_hub_data_and_code_of_ones_own_reach_every_command(tmp_path: Path) -> None:
    for name in ("objective", "judge"):
        (tmp_path / f"{name}.py").write_text("")
    hub = {name: f"hub:o/{name}:s" for name in ("harmful", "borderline", "benign", "task")}
    config = {
        "realign": True,
        "align_data": {"refusals": ["hub:o/refusals"], "benign": ["hub:o/more"]},
        "refusals": "hub:o/pairs",
        "datasets": {"hub": ["hub:o/rows"]},
        "rehearsal": {"prompts": ["hub:o/prompts"]},
        "training": {"dataset": "hub"},
        "runs": {"own": {"objective": "objective.py:loss"}},
        "evaluation": hub,
        "cache": "s3://bucket/cache",
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    planned = plan(path, "--printshellcmds")
    for option in (
        "--refusals hub:o/refusals --benign hub:o/more --harmful-check hub:o/harmful:s",
        "--base results/models/base --refusals hub:o/pairs",
        "--rows hub:o/rows --safety-tokens",
        "--rows hub:o/rows --safety-tokens results/safety_tokens.json --targets",
        "--rehearsal results/rehearsal/targets.json",
        "--prompts hub:o/prompts",
        *(f"--{name} {value}" for name, value in hub.items()),
        "--objective objective.py:loss",
        "--save-steps 100 --cache s3://bucket/cache",
    ):
        assert option in planned
    inputs = [line for line in planned.splitlines() if line.strip().startswith("input:")]
    assert not any("hub:" in line for line in inputs)
    assert any("objective.py" in line for line in inputs)


def test_the_published_protocol_is_planned_whole(tmp_path: Path) -> None:
    (tmp_path / "protocol").mkdir()
    config = read_yaml(ROOT / "stages" / "pact-paper.yaml")
    files = {file for files in config["datasets"].values() for file in files}
    asked = config["evaluation"]
    for file in (*files, asked["task"], asked["sets"]["agnews:task"]):
        if not (ROOT / file).exists():
            write_rows(tmp_path / file, [{"prompt": "Where is it?", "response": "Shipping"}])
    planned = plan(ROOT / "stages" / "pact-paper.yaml", "--printshellcmds", directory=tmp_path)
    runs = len(config["runs"]) * len(config["seeds"])
    assert planned.count("rule finetune:") == planned.count("rule evaluate:") == runs
    assert planned.count("rule targets:") == 4
    for option in (
        *("--set strongreject=hub", "--set xstest-safe=hub", "--prefill 5,20"),
        *("--max-new-tokens 1024", "--guard meta-llama/Llama-Guard-3-8B", "--lm-eval sst2,gsm8k"),
        *("agnews:task=protocol/agnews_test.jsonl", """--task-scores '{"agnews": "choice"}'"""),
    ):
        assert option in planned


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        ({"jokes": "rows.jsonl"}, "evaluation.sets.jokes: expected jokes:KIND with one of"),
        ({"jokes:answer": "hub"}, "evaluation.sets.jokes:answer: expected NAME:KIND=SOURCE or one"),
        ({"harmbench": "nowhere.csv"}, "evaluation.sets.harmbench: expected a file here or in"),
    ],
)
def test_a_bad_set_stops_the_workflow_before_any_work(
    sets: dict[str, str], line: str, tmp_path: Path
) -> None:
    values = few_rows(tmp_path)
    values["evaluation"]["sets"] = sets
    values["runs"] = {"sft": {"objective": "none"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    made = snakemake(path, "--dry-run")
    assert made.returncode != 0
    assert [text for text in made.stderr.splitlines() if line in text]
    assert "Traceback" not in made.stderr


def test_files_of_a_config_are_found_here_or_else_beside_the_snakefile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        (folder / "models" / folder.name).mkdir(parents=True)
        few_rows(folder)
    (here / "task.jsonl").unlink()
    (beside / "own.py").write_text("")
    (beside / "data").mkdir()
    write_rows(beside / "data" / "rehearsal.jsonl", [{"prompt": "Hello"}])
    monkeypatch.chdir(here)
    values = {
        **few_rows(beside),
        "models": {"aligned": "models/beside", "base": "models/here"},
        "datasets": {"few": ["rows.jsonl", "hub:o/rows", str(beside / "rows.jsonl")]},
        "runs": {"own": {"objective": "own.py:loss", "seed": 1}, "pact": {}},
        "sweep": {"objective": ["none", "own.py:loss"]},
        "evaluate": {"guard": "meta-llama/Llama-Guard-3-8B"},
    }
    config = located(parse_settings(WorkflowConfig, values, "config"), beside)
    assert config.models.aligned == str(beside / "models" / "beside")
    assert config.models.base == "models/here"
    assert config.refusals == "rows.jsonl"
    assert config.datasets["few"] == ("rows.jsonl", "hub:o/rows", str(beside / "rows.jsonl"))
    assert config.rehearsal
    assert config.rehearsal.prompts == (str(beside / "data" / "rehearsal.jsonl"),)  # by default
    assert config.evaluation.harmful == "harmful.jsonl"
    assert config.evaluation.task == str(beside / "task.jsonl")
    assert config.run("own").objective == f"{beside / 'own.py'}:loss"
    assert config.run("own").seed == 1
    assert config.run("pact-objective-own.py-loss").objective == f"{beside / 'own.py'}:loss"
    assert config.evaluate.guard == "meta-llama/Llama-Guard-3-8B"
    assert config.evaluate.model_fields_set == {"guard"}  # the rest is the machine's own


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"refusals": "gone.jsonl"}, "refusals"),
        ({"token_list": "hub:o/gone.jsonl"}, "token_list"),
        ({"datasets": {"few": ["rows.jsonl", "gone.jsonl"]}}, "datasets.few"),
        ({"align_data": {"refusals": ["gone.jsonl"], "benign": []}}, "align_data.refusals"),
        ({"runs": {"own": {"objective": "gone.jsonl.py:f"}}}, "runs.own.objective"),
        ({"training": {"dataset": "few", "objective": "gone.jsonl.py:f"}}, "training.objective"),
    ],
)
def test_a_file_that_is_nowhere_is_named_with_its_key(
    change: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    benign = {"align_data": {"refusals": ["rows.jsonl"], "benign": ["benign.jsonl"]}}
    values = {**few_rows(tmp_path), **benign, "runs": {"pact": {}}, **change}
    if "align_data" in change:
        values["align_data"]["benign"] = ["benign.jsonl"]
    config = parse_settings(WorkflowConfig, values, "config")
    with pytest.raises(MissingFileError, match=rf"config: {key}: expected a file .*gone\.jsonl"):
        located(config, ROOT)


def test_a_missing_file_stops_the_workflow_with_one_line(tmp_path: Path) -> None:
    values = {**few_rows(tmp_path), "runs": {"sft": {"objective": "none"}}}
    for change, said in (
        ({"token_list": "gone.json"}, "config: token_list: expected a file"),
        ({"models": {"aligned": "./gone", "base": "./gone"}}, "./gone: no such model directory"),
    ):
        path = tmp_path / "config.yaml"
        benign = {"align_data": {"refusals": ["rows.jsonl"], "benign": ["benign.jsonl"]}}
        path.write_text(yaml.safe_dump({**values, **benign, **change}))
        made = snakemake(path, "--dry-run")
        assert made.returncode == 2
        assert f"pact-offline: {said}" in made.stderr
        assert "Traceback" not in made.stderr
        assert "Building DAG" not in made.stderr

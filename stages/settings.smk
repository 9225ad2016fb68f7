# What every stage file needs: the checked config, and how a stage calls the command line.
import hashlib
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from pact_offline.errors import PactError
from pact_offline.evaluation.prompt_sets import check_set
from pact_offline.models.locate import files_of, require_model, split_adapter
from pact_offline.own_code import file_of
from pact_offline.settings.located import located
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.stages import HOLD_NOTHING, LoraSettings
from pact_offline.settings.workflow import RunConfig, WorkflowConfig
from pact_offline.machine import usable_cores

try:
    GIVEN = parse_settings(WorkflowConfig, config, "config")
    CONFIG = located(GIVEN, Path(workflow.basedir))
    for name, source in CONFIG.evaluation.sets.items():
        check_set(name, source, f"config: evaluation.sets.{name}")
    for model in (CONFIG.models.reference, CONFIG.models.base, CONFIG.evaluate.guard):
        if model:
            require_model(model)
except (PactError, OSError) as error:
    print(f"pact-offline: {error}", file=sys.stderr)
    sys.exit(2)
OUTPUT = Path(CONFIG.output)
CACHE = CONFIG.cache or str(OUTPUT / "cache")  # a directory or a URL
IS_DEMO = CONFIG.models.aligned is None
ALIGNED = str(OUTPUT / "models" / "aligned") if IS_DEMO else CONFIG.models.reference
RUNS = CONFIG.all_runs()
BASE = str(OUTPUT / "models" / "base") if IS_DEMO else CONFIG.models.base
# A global in the text of a command, not a parameter: Python's path decides no result, and a
# checkout that was moved has another.
PACT = f"{shlex.quote(sys.executable)} -m pact_offline"

# `--cores all` counts a machine's cores; in a container with a quota, fewer can be kept busy. On a
# cluster, the cores are those of a job.
if workflow.resource_settings.cores and workflow.nodes is None:
    workflow.register_resource("_cores", min(workflow.resource_settings.cores, usable_cores()))
    # Datasets share rows, which two that are scored at once would both score.
    workflow.register_resource("scoring", CONFIG.score_parts)
# First what trainings wait for, then trainings: shorter jobs at the end leave no core idle.
BEFORE_TRAINING, TRAINING = 2, 1


wildcard_constraints:
    run="[A-Za-z0-9][A-Za-z0-9._-]*",
    dataset="[A-Za-z0-9][A-Za-z0-9._-]*",


def cores_each(jobs):
    """A job's part of the cores, where so many run at once. On the machine of a cluster's job they
    are those that it asked for."""
    return max(1, workflow.cores // (1 if workflow.remote_exec else jobs))


JOB_CORES = cores_each(CONFIG.concurrent_jobs)


def options(settings, without=()):
    """Command-line options for the settings that differ from their defaults.

    A default that is the machine's own is left to the machine that the job runs on.
    """
    parts = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        is_default = value == field.default or name not in settings.model_fields_set
        if name in without or value is None or is_default:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{option}" if value else f"--no-{option}")
            continue
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        value = json.dumps(value) if isinstance(value, dict) else value
        parts += [f"--{option}", shlex.quote(str(value))]
    return " ".join(parts)


def repeated(option, values):
    """`--option VALUE` for each value."""
    return " ".join(f"{option} {shlex.quote(str(value))}" for value in values)


def local_files(names):
    """Those of the names that are files of ours, not hub ids: only these can be a rule's input."""
    return [name for name in map(str, names) if not name.startswith("hub:")]


def model_input(name):
    """A model that this workflow makes, or the files of one that is there: a folder's own time does
    not change when a file in it is written over."""
    if name is None:
        return []
    if IS_DEMO and name in (ALIGNED, BASE):
        return [name]
    parts = [part for part in split_adapter(name) if part]
    return [str(file) for part in parts for file in files_of(Path(part))]


def chat_template(settings):
    """The file of a chat template, if one is set: other content, another result."""
    return [settings.chat_template] if settings.chat_template else []


def own_code(settings):
    """The files of functions of the user's own among settings: other content, another result."""
    values = [v if isinstance(v, tuple) else (v,) for v in vars(settings).values()]
    names = [name for value in values for name in value if isinstance(name, str)]
    return [str(file) for file in map(file_of, names) if file]


def own_tasks(settings):
    """The files of lm-eval tasks of the user's own."""
    folder = settings.lm_eval_include
    found = [f for kind in ("*.yaml", "*.py") for f in Path(folder).rglob(kind)] if folder else []
    return sorted(map(str, found))

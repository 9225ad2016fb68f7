# What every stage file needs: the checked config, and how a stage calls the command line.
import shlex
import sys
from pathlib import Path

from snakemake.utils import validate

from pact_offline.settings.parse import parse_settings
from pact_offline.settings.workflow import WorkflowConfig
from pact_offline.errors import PactError

try:
    CONFIG = parse_settings(WorkflowConfig, config, "config")
except PactError as error:
    print(f"pact-offline: {error}", file=sys.stderr)
    sys.exit(2)
validate(config, "config.schema.yaml")
OUTPUT = Path(CONFIG.output)
CACHE = CONFIG.cache or str(OUTPUT / "cache")  # a directory or a URL
IS_DEMO = CONFIG.models.aligned is None
ALIGNED = str(OUTPUT / "models" / "aligned") if IS_DEMO else CONFIG.models.aligned
BASE = str(OUTPUT / "models" / "base") if IS_DEMO else CONFIG.models.base
PACT = f"{shlex.quote(sys.executable)} -m pact_offline"


wildcard_constraints:
    run="[A-Za-z0-9][A-Za-z0-9._-]*",
    dataset="[A-Za-z0-9][A-Za-z0-9._-]*",


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
        value = ",".join(value) if isinstance(value, tuple) else value
        parts += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return " ".join(parts)


def repeated(option, values):
    """`--option VALUE` for each value."""
    return " ".join(f"{option} {shlex.quote(str(value))}" for value in values)


def local_files(names):
    """Those of the names that are files of ours, not hub ids: only these can be a rule's input."""
    return [name for name in map(str, names) if not name.startswith("hub:")]


def model_input(name):
    """A model directory that this workflow makes, or one that is already there."""
    return [name] if IS_DEMO or Path(name).is_dir() else []

# From a pair of models and rows to a report. The demo's config is stages/config.yaml, and every key
# is in stages/config.schema.yaml.
from snakemake.utils import min_version

min_version("9.10")


# Snakemake would merge a --configfile into this one key by key: a user's runs would train with the
# demo's settings, and the demo's runs among theirs.
if not workflow.config_settings.configfiles:

    configfile: Path(workflow.basedir, "stages", "config.yaml")


include: "stages/settings.smk"
include: "stages/restart.smk"
include: "stages/demo.smk"
include: "stages/modules.smk"
include: "stages/tokens.smk"
include: "stages/score.smk"
include: "stages/screen.smk"
include: "stages/rehearse.smk"
include: "stages/finetune.smk"
include: "stages/evaluate.smk"
include: "stages/report.smk"


rule all:
    default_target: True
    input:
        OUTPUT / "report.html",

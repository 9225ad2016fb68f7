# From a pair of models and rows to a report. See stages/config.yaml for every key.
from snakemake.utils import min_version

min_version("9.10")


configfile: "stages/config.yaml"


include: "stages/settings.smk"
include: "stages/demo.smk"
include: "stages/tokens.smk"
include: "stages/score.smk"
include: "stages/finetune.smk"
include: "stages/evaluate.smk"
include: "stages/report.smk"


rule all:
    default_target: True
    input:
        OUTPUT / "report.html",

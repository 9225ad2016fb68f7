RUNS = {name: CONFIG.run(name) for name in CONFIG.runs}


def run_rows(wildcards):
    return local_files(CONFIG.datasets[RUNS[wildcards.run].dataset])


def needs_targets(run):
    """Plain fine-tuning needs no targets, nor does one with the reference in memory."""
    return run.objective != "none" and run.reference != "live"


def run_targets(wildcards):
    """Targets that are scored again are the same: what decides them is this rule's own input and
    parameters, so that no adapter is trained again because a cache was removed."""
    run = RUNS[wildcards.run]
    return ancient(OUTPUT / "targets" / run.dataset / "targets.json") if needs_targets(run) else []


def run_tokens(wildcards):
    return [] if RUNS[wildcards.run].objective == "none" else rules.tokens.output


def targets_option(wildcards):
    run = RUNS[wildcards.run]
    if run.objective == "none":
        return ""
    tokens = f"--safety-tokens {shlex.quote(str(rules.tokens.output[0]))}"
    if not needs_targets(run):
        return tokens
    return f"--targets {shlex.quote(str(run_targets(wildcards)))} {tokens}"


def finetune_means(wildcards):
    """What changes no adapter: how often it is saved, and that a remote cache may be read."""
    run = RUNS[wildcards.run]
    is_remote = needs_targets(run) and "://" in CACHE
    return f"--save-steps {run.save_steps}" + (f" --cache {shlex.quote(CACHE)}" if is_remote else "")


rule finetune:
    input:
        rows=run_rows,
        template=lambda wildcards: chat_template(RUNS[wildcards.run]),
        targets=run_targets,
        tokens=run_tokens,
        model=model_input(ALIGNED),
        code=lambda wildcards: own_code(RUNS[wildcards.run]),
    output:
        directory(OUTPUT / "adapters" / "{run}"),
    log:
        OUTPUT / "logs" / "finetune" / "{run}.log",
    benchmark:
        OUTPUT / "benchmarks" / "finetune" / "{run}.tsv"
    threads: workflow.cores
    resources:
        mem_mb=6000,
        runtime=720,
        gpu=0 if IS_DEMO else 1,
        means=finetune_means,
    params:
        model=ALIGNED,
        rows=lambda wildcards: repeated("--rows", CONFIG.datasets[RUNS[wildcards.run].dataset]),
        targets=targets_option,
        scored=lambda wildcards: SCORE_VALUES if needs_targets(RUNS[wildcards.run]) else "",
        settings=lambda wildcards: options(
            RUNS[wildcards.run], without=["dataset", "save_steps"]
        ),
    shell:
        "OMP_NUM_THREADS={threads} {PACT} finetune --model {params.model:q} {params.rows} "
        "{params.targets} -o {output:q} {params.settings} {resources.means} "
        "2>&1 | tee -i {log:q} >&2"

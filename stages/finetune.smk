RUNS = {name: CONFIG.run(name) for name in CONFIG.runs}


def run_rows(wildcards):
    return local_files(CONFIG.datasets[RUNS[wildcards.run].dataset])


def run_targets(wildcards):
    """Plain fine-tuning needs no targets."""
    run = RUNS[wildcards.run]
    if run.objective == "none":
        return []
    return OUTPUT / "targets" / run.dataset / "targets.json"


def targets_option(wildcards):
    run = RUNS[wildcards.run]
    if run.objective == "none":
        return ""
    targets = shlex.quote(str(run_targets(wildcards)))
    tokens = shlex.quote(str(rules.tokens.output[0]))
    return f"--targets {targets} --safety-tokens {tokens}"


rule finetune:
    input:
        rows=run_rows,
        targets=run_targets,
        model=model_input(ALIGNED),
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
    params:
        pact=PACT,
        model=ALIGNED,
        rows=lambda wildcards: repeated("--rows", CONFIG.datasets[RUNS[wildcards.run].dataset]),
        targets=targets_option,
        settings=lambda wildcards: options(RUNS[wildcards.run], without=["dataset"]),
    shell:
        "OMP_NUM_THREADS={threads} {params.pact} finetune --model {params.model:q} {params.rows} "
        "{params.targets} -o {output:q} {params.settings} 2>&1 | tee {log:q} >&2"

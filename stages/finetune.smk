RUNS = {name: CONFIG.run(name) for name in CONFIG.runs}


def run_rows(wildcards):
    return local_files(CONFIG.datasets[RUNS[wildcards.run].dataset])


def run_targets(wildcards):
    """Plain fine-tuning needs no targets, nor does one with the reference in memory."""
    run = RUNS[wildcards.run]
    if run.objective == "none" or run.reference == "live":
        return []
    return OUTPUT / "targets" / run.dataset / "targets.json"


def run_tokens(wildcards):
    return [] if RUNS[wildcards.run].objective == "none" else rules.tokens.output


def targets_option(wildcards):
    run = RUNS[wildcards.run]
    if run.objective == "none":
        return ""
    tokens = f"--safety-tokens {shlex.quote(str(rules.tokens.output[0]))}"
    if run.reference == "live":
        return tokens
    return f"--targets {shlex.quote(str(run_targets(wildcards)))} {tokens}"


rule finetune:
    input:
        rows=run_rows,
        targets=run_targets,
        tokens=run_tokens,
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

# Parts fill one store at the same time; the last step only binds what is there. The store knows
# its contexts by content, so another number of parts rescores nothing.
scattergather:
    score=CONFIG.score_parts,


# What decides values; the means to get them do not, so changing those reruns nothing.
MEANS = {"batch_tokens", "compile", "gpu_memory_utilization", "tensor_parallel_size", "shard_steps"}
SCORE_VALUES = options(CONFIG.score, without=MEANS)
# They go by way of a resource: neither those nor their text in a command count as changes.
SCORE_MEANS = f"--shard-steps {CONFIG.score.shard_steps} " + options(
    CONFIG.score, without=set(type(CONFIG.score).model_fields) - MEANS | {"shard_steps"}
)


def rows_of(wildcards):
    return repeated("--rows", CONFIG.datasets[wildcards.dataset])


def row_files(wildcards):
    return local_files(CONFIG.datasets[wildcards.dataset])


rule score_part:
    input:
        rows=row_files,
        tokens=rules.tokens.output,
        model=model_input(ALIGNED),
    output:
        touch(OUTPUT / "targets" / "{dataset}" / "{scatteritem}.done"),
    log:
        OUTPUT / "logs" / "score" / "{dataset}.{scatteritem}.log",
    benchmark:
        OUTPUT / "benchmarks" / "score" / "{dataset}.{scatteritem}.tsv"
    threads: max(1, workflow.cores // CONFIG.score_parts)
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=0 if IS_DEMO else 1,
        means=SCORE_MEANS,
    params:
        pact=PACT,
        model=ALIGNED,
        rows=rows_of,
        values=SCORE_VALUES,
    shell:
        "part={wildcards.scatteritem}; "
        "OMP_NUM_THREADS={threads} {params.pact} score --model {params.model:q} {params.rows} "
        f"--safety-tokens {{input.tokens:q}} --cache {shlex.quote(CACHE)} "
        '--part "${{part%%-of-*}}/${{part##*-of-}}" '
        "{params.values} {resources.means} 2>&1 | tee {log:q} >&2"


rule targets:
    input:
        parts=gather.score(str(OUTPUT / "targets" / "{{dataset}}" / "{scatteritem}.done")),
        rows=row_files,
        tokens=rules.tokens.output,
        model=model_input(ALIGNED),
    output:
        OUTPUT / "targets" / "{dataset}" / "targets.json",
    log:
        OUTPUT / "logs" / "targets" / "{dataset}.log",
    resources:
        mem_mb=2000,
        runtime=30,
        means=SCORE_MEANS,
    params:
        pact=PACT,
        model=ALIGNED,
        rows=rows_of,
        values=SCORE_VALUES,
    shell:
        "{params.pact} score --model {params.model:q} {params.rows} "
        f"--safety-tokens {{input.tokens:q}} --cache {shlex.quote(CACHE)} -o {{output:q}} "
        "{params.values} {resources.means} 2>&1 | tee {log:q} >&2"

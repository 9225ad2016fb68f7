# Parts fill one store at the same time; the last step only binds what is there. The store knows
# its contexts by content, so another number of parts rescores nothing.
from functools import cache

from pact_offline.cache.presence import is_made_of, is_there


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


@cache
def is_gone(targets):
    """Whether a targets.json is here and (some of) the targets that it names are not."""
    if not targets.exists() or is_there(targets, CACHE):
        return False
    print(f"pact-offline: {targets}: its cache is gone; it is scored again", file=sys.stderr)
    return True


def digest_of(targets, sources):
    """What a training takes from targets, as its input: the same content where they are the same.

    While they are merely scored again, as their cache is gone, that is no reason to train again.
    Else it must be a plain input: Snakemake does not look at the other inputs of a job behind one
    that runs, and an ancient one would hide that the rows have changed.
    """
    digest = targets.with_name("digest.txt")
    is_refilled = digest.exists() and is_gone(targets) and is_made_of(targets, sources)
    return ancient(digest) if is_refilled else digest


def parts_done(wildcards):
    """The marks of a dataset's parts. They outlive its cache: where that is gone, they are made
    again, as with --forcerun, and the targets with them."""
    folder = OUTPUT / "targets" / wildcards.dataset
    parts = gather.score(str(folder / "{scatteritem}.done"))
    if workflow.is_main_process and is_gone(folder / "targets.json"):
        workflow.dag.forcefiles.update([*parts, str(folder / "targets.json")])
    return parts


rule score_part:
    input:
        rows=row_files,
        template=chat_template(CONFIG.score),
        tokens=rules.tokens.output,
        model=model_input(ALIGNED),
    output:
        touch(OUTPUT / "targets" / "{dataset}" / "{scatteritem}.done"),
    log:
        OUTPUT / "logs" / "score" / "{dataset}.{scatteritem}.log",
    benchmark:
        OUTPUT / "benchmarks" / "score" / "{dataset}.{scatteritem}.tsv"
    priority: BEFORE_TRAINING
    threads: cores_each(max(CONFIG.concurrent_jobs, CONFIG.score_parts))
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=0 if IS_DEMO else 1,
        scoring=1,
        means=SCORE_MEANS,
    params:
        model=ALIGNED,
        rows=rows_of,
        cache=CACHE,
        values=SCORE_VALUES,
    shell:
        "part={wildcards.scatteritem}; "
        "OMP_NUM_THREADS={threads} {PACT} score --model {params.model:q} {params.rows} "
        "--safety-tokens {input.tokens:q} --cache {params.cache:q} "
        '--part "${{part%%-of-*}}/${{part##*-of-}}" '
        "{params.values} {resources.means} 2>&1 | tee -i {log:q} >&2"


rule targets:
    input:
        parts=parts_done,
        template=chat_template(CONFIG.score),
        rows=row_files,
        tokens=rules.tokens.output,
        model=model_input(ALIGNED),
    output:
        targets=OUTPUT / "targets" / "{dataset}" / "targets.json",
        digest=OUTPUT / "targets" / "{dataset}" / "digest.txt",
    log:
        OUTPUT / "logs" / "targets" / "{dataset}.log",
    priority: BEFORE_TRAINING
    resources:
        mem_mb=2000,
        runtime=30,
        means=SCORE_MEANS,
    params:
        model=ALIGNED,
        rows=rows_of,
        cache=CACHE,
        values=SCORE_VALUES,
    shell:
        "{PACT} score --model {params.model:q} {params.rows} "
        "--safety-tokens {input.tokens:q} --cache {params.cache:q} -o {output.targets:q} "
        "{params.values} {resources.means} 2>&1 | tee -i {log:q} >&2; "
        "{PACT} cache digest {output.targets:q} > {output.digest:q}"

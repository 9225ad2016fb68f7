# Made once for a reference, and mixed into the batches of every run that rehearses.
REHEARSAL = OUTPUT / "rehearsal" / "targets.json"


def rehearsal_is_kept(wildcards):
    """The prompts; where the answers' cache is gone, they are made and scored again."""
    if workflow.is_main_process and is_gone(REHEARSAL):
        workflow.dag.forcefiles.add(str(REHEARSAL))
    return local_files(CONFIG.rehearsal.prompts)


if CONFIG.rehearsal:

    rule rehearse:
        input:
            prompts=rehearsal_is_kept,
            template=chat_template(CONFIG.score),
            tokens=rules.tokens.output,
            model=model_input(ALIGNED),
        output:  # and the answers, which are not made again where only their cache is gone
            targets=REHEARSAL,
            digest=REHEARSAL.with_name("digest.txt"),
        log:
            OUTPUT / "logs" / "rehearse.log",
        benchmark:
            OUTPUT / "benchmarks" / "rehearse.tsv"
        priority: BEFORE_TRAINING
        threads: JOB_CORES
        resources:
            mem_mb=8000,
            runtime=120,
            gpu=0 if IS_DEMO else 1,
            means=SCORE_MEANS,
        params:
            model=ALIGNED,
            prompts=repeated("--prompts", CONFIG.rehearsal.prompts),
            answers=options(CONFIG.rehearsal, without=["prompts"]),
            cache=CACHE,
            values=SCORE_VALUES,
        shell:
            "OMP_NUM_THREADS={threads} {PACT} rehearse --model {params.model:q} {params.prompts} "
            "--safety-tokens {input.tokens:q} --cache {params.cache:q} -o {output.targets:q} "
            "{params.answers} {params.values} {resources.means} 2>&1 | tee -i {log:q} >&2; "
            "{PACT} cache digest {output.targets:q} > {output.digest:q}"

# The reference is evaluated first: every run's drift is measured on its answers.
EVALUATED = OUTPUT / "evaluation"
PROMPTS = {
    "harmful": CONFIG.evaluation.harmful,
    "borderline": CONFIG.evaluation.borderline,
    "benign": CONFIG.evaluation.benign,
    "task": CONFIG.evaluation.task,
}
EVALUATE = (
    "OMP_NUM_THREADS={threads} {params.pact} evaluate --model {params.model:q} "
    "--harmful {input.harmful:q} --borderline {input.borderline:q} --benign {input.benign:q} "
    "--task {input.task:q} --safety-tokens {input.tokens:q} -o {output:q} {params.settings} "
    "{resources.means} "
)


rule evaluate_reference:
    input:
        **PROMPTS,
        tokens=rules.tokens.output,
        reference=model_input(ALIGNED),
    output:
        directory(EVALUATED / "reference"),
    log:
        OUTPUT / "logs" / "evaluate" / "reference.log",
    benchmark:
        OUTPUT / "benchmarks" / "evaluate" / "reference.tsv"
    threads: workflow.cores
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.evaluate.batch_size}",
    params:
        pact=PACT,
        model=ALIGNED,
        settings=options(CONFIG.evaluate, without=["batch_size"]),
    shell:
        EVALUATE + "--name reference 2>&1 | tee {log:q} >&2"


rule evaluate:
    input:
        **PROMPTS,
        tokens=rules.tokens.output,
        reference=rules.evaluate_reference.output,
        adapter=OUTPUT / "adapters" / "{run}",
    output:
        directory(EVALUATED / "runs" / "{run}"),
    log:
        OUTPUT / "logs" / "evaluate" / "{run}.log",
    benchmark:
        OUTPUT / "benchmarks" / "evaluate" / "{run}.tsv"
    threads: workflow.cores
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.evaluate.batch_size}",
    params:
        pact=PACT,
        model=ALIGNED,
        settings=options(CONFIG.evaluate, without=["batch_size"]),
    shell:
        EVALUATE + "--name {wildcards.run:q} --adapter {input.adapter:q} "
        "--reference {input.reference:q} 2>&1 | tee {log:q} >&2"

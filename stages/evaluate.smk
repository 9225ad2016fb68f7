# The reference is evaluated first: every run's drift is measured on its answers.
EVALUATED = OUTPUT / "evaluation"
SETS = CONFIG.evaluation.sets
PROMPTS = {n: value for n, value in CONFIG.evaluation if n != "sets" and value}
PROMPT_OPTIONS = " ".join(
    [
        *(repeated(f"--{name}", [value]) for name, value in PROMPTS.items()),
        *(repeated("--set", [f"{name}={value}"]) for name, value in SETS.items()),
    ]
)
JUDGED_BY = dict(
    prompts=local_files([*PROMPTS.values(), *(v for v in SETS.values() if v != "hub")]),
    guard=model_input(CONFIG.evaluate.guard),
    code=own_code(CONFIG.evaluate),
    tasks=own_tasks(CONFIG.evaluate),
    template=chat_template(CONFIG.evaluate),
)
ANSWERS = EVALUATED / "answers"
EVALUATE = (
    "OMP_NUM_THREADS={threads} {PACT} evaluate --model {params.model:q} {params.prompts} "
    "--safety-tokens {input.tokens:q} --answers {ANSWERS:q} -o {output:q} {params.settings} "
    "{resources.means} "
)
# Of `auto`, the machine that the job runs on decides, and without a GPU answers nothing here.
HAS_ONE_ENGINE = CONFIG.one_engine and (
    CONFIG.evaluate.backend == "vllm"
    or (CONFIG.evaluate.backend == "auto" and not IS_DEMO and find_spec("vllm") is not None)
)


# A stamp, whose time is not looked at: an evaluation takes the answers that were made of just its
# model and prompts, and makes those that it misses. Another run has no other evaluated anew.
rule answer:
    input:
        **JUDGED_BY,
        reference=model_input(ALIGNED),
        adapters=[OUTPUT / "adapters" / run for run in RUNS],
    output:
        touch(EVALUATED / "answered"),
    log:
        OUTPUT / "logs" / "evaluate" / "answer.log",
    benchmark:
        OUTPUT / "benchmarks" / "answer.tsv"
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=240,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.evaluate.batch_size}",
    params:
        model=ALIGNED,
        adapters=repeated("--adapter", [OUTPUT / "adapters" / run for run in RUNS]),
        prompts=PROMPT_OPTIONS,
        settings=options(CONFIG.evaluate, without=["batch_size"]),
    shell:
        "OMP_NUM_THREADS={threads} {PACT} answer --model {params.model:q} {params.adapters} "
        "{params.prompts} --answers {ANSWERS:q} {params.settings} {resources.means} "
        "2>&1 | tee -i {log:q} >&2"


ANSWERED = [ancient(EVALUATED / "answered")] if HAS_ONE_ENGINE else []


rule evaluate_reference:
    input:
        **JUDGED_BY,
        answered=ANSWERED,
        tokens=rules.tokens.output,
        reference=model_input(ALIGNED),
    output:
        directory(EVALUATED / "reference"),
    log:
        OUTPUT / "logs" / "evaluate" / "reference.log",
    benchmark:
        OUTPUT / "benchmarks" / "evaluate" / "reference.tsv"
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.evaluate.batch_size}",
    params:
        model=ALIGNED,
        prompts=PROMPT_OPTIONS,
        settings=options(CONFIG.evaluate, without=["batch_size"]),
    shell:
        EVALUATE + "--name reference 2>&1 | tee -i {log:q} >&2"


rule evaluate:
    input:
        **JUDGED_BY,
        answered=ANSWERED,
        tokens=rules.tokens.output,
        reference=rules.evaluate_reference.output,
        adapter=OUTPUT / "adapters" / "{run}",
    output:
        directory(EVALUATED / "runs" / "{run}"),
    log:
        OUTPUT / "logs" / "evaluate" / "{run}.log",
    benchmark:
        OUTPUT / "benchmarks" / "evaluate" / "{run}.tsv"
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=120,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.evaluate.batch_size}",
    params:
        model=ALIGNED,
        prompts=rules.evaluate_reference.params.prompts,
        settings=options(CONFIG.evaluate, without=["batch_size"]),
    shell:
        EVALUATE + "--name {wildcards.run:q} --adapter {input.adapter:q} "
        "--reference {input.reference:q} 2>&1 | tee -i {log:q} >&2"

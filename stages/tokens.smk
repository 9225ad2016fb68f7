# Found from the pair of models and refusals, or read from a hand-made list.
if CONFIG.token_list:
    TOKENS_FROM = {"list": local_files([CONFIG.token_list])}
    TOKENS_OPTIONS = f"--from-list {shlex.quote(CONFIG.token_list)}"
else:
    TOKENS_FROM = {"refusals": local_files([CONFIG.refusals]), "base": model_input(BASE)}
    TOKENS_OPTIONS = f"--base {shlex.quote(BASE)} --refusals {shlex.quote(CONFIG.refusals)}"


rule tokens:
    input:
        **TOKENS_FROM,
        aligned=model_input(ALIGNED),
        template=chat_template(CONFIG.tokens),
    output:
        OUTPUT / "safety_tokens.json",
    log:
        OUTPUT / "logs" / "tokens.log",
    benchmark:
        OUTPUT / "benchmarks" / "tokens.tsv"
    priority: BEFORE_TRAINING
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=60,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.tokens.batch_size}",
    params:
        aligned=ALIGNED,
        source=TOKENS_OPTIONS,
        settings=options(CONFIG.tokens, without=["batch_size"]),
    shell:
        "OMP_NUM_THREADS={threads} {PACT} tokens --aligned {params.aligned:q} "
        "{params.source} -o {output:q} "
        "{resources.means} {params.settings} 2>&1 | tee -i {log:q} >&2"

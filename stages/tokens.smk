rule tokens:
    input:
        refusals=local_files([CONFIG.refusals]),
        aligned=model_input(ALIGNED),
        base=model_input(BASE),
    output:
        OUTPUT / "safety_tokens.json",
    log:
        OUTPUT / "logs" / "tokens.log",
    benchmark:
        OUTPUT / "benchmarks" / "tokens.tsv"
    threads: workflow.cores
    resources:
        mem_mb=6000,
        runtime=60,
        gpu=0 if IS_DEMO else 1,
        means=f"--batch-size {CONFIG.tokens.batch_size}",
    params:
        pact=PACT,
        aligned=ALIGNED,
        base=BASE,
        refusals=CONFIG.refusals,
        settings=options(CONFIG.tokens, without=["batch_size"]),
    shell:
        "OMP_NUM_THREADS={threads} {params.pact} tokens --aligned {params.aligned:q} "
        "--base {params.base:q} --refusals {params.refusals:q} -o {output:q} "
        "{resources.means} {params.settings} 2>&1 | tee {log:q} >&2"

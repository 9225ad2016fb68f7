# The bundled demo pair; these rules run only where the config names no models.
if IS_DEMO:

    rule demo_base:
        output:
            directory(OUTPUT / "models" / "base"),
        log:
            OUTPUT / "logs" / "demo_base.log",
        benchmark:
            OUTPUT / "benchmarks" / "demo_base.tsv"
        resources:
            mem_mb=4000,
            runtime=10,
        params:
            pact=PACT,
        shell:
            "{params.pact} demo extract -o {output:q} 2> {log:q}"

    rule demo_aligned:
        input:
            base=rules.demo_base.output,
            refusals=CONFIG.align_data.refusals,
            benign=CONFIG.align_data.benign,
            harmful=CONFIG.evaluation.harmful,
            plain=CONFIG.evaluation.benign,
            task=CONFIG.evaluation.task,
        output:
            directory(OUTPUT / "models" / "aligned"),
        log:
            OUTPUT / "logs" / "demo_aligned.log",
        benchmark:
            OUTPUT / "benchmarks" / "demo_aligned.tsv"
        threads: workflow.cores
        resources:
            mem_mb=6000,
            runtime=30,
        params:
            pact=PACT,
            refusals=repeated("--refusals", CONFIG.align_data.refusals),
            benign=repeated("--benign", CONFIG.align_data.benign),
            settings=options(CONFIG.align),
        shell:
            "OMP_NUM_THREADS={threads} {params.pact} demo align --base {input.base:q} "
            "{params.refusals} {params.benign} --harmful-check {input.harmful:q} "
            "--benign-check {input.plain:q} --task-check {input.task:q} -o {output:q} "
            "{params.settings} 2>&1 | tee {log:q} >&2"

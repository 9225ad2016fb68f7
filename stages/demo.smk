# The bundled demo pair; these rules run only where the config names no models. The aligned one is
# the untouched one with an adapter that comes with the project, or with one that is made anew.
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
        shell:
            "{PACT} demo extract -o {output:q} 2> {log:q}"

    if CONFIG.realign:
        CHECKS = {
            "--harmful-check": CONFIG.evaluation.harmful,
            "--benign-check": CONFIG.evaluation.benign,
            "--task-check": CONFIG.evaluation.task,
        }

        rule demo_align:
            input:
                base=rules.demo_base.output,
                refusals=local_files(CONFIG.align_data.refusals),
                benign=local_files(CONFIG.align_data.benign),
                checks=local_files(CHECKS.values()),
            output:
                directory(OUTPUT / "models" / "adapter"),
            log:
                OUTPUT / "logs" / "demo_align.log",
            benchmark:
                OUTPUT / "benchmarks" / "demo_align.tsv"
            threads: workflow.cores
            resources:
                mem_mb=6000,
                runtime=30,
            params:
                refusals=repeated("--refusals", CONFIG.align_data.refusals),
                benign=repeated("--benign", CONFIG.align_data.benign),
                checks=" ".join(repeated(option, [name]) for option, name in CHECKS.items()),
                settings=options(CONFIG.align),
            shell:
                "OMP_NUM_THREADS={threads} {PACT} demo align --base {input.base:q} {params.refusals} "
                "{params.benign} {params.checks} -o {output:q} {params.settings} "
                "2>&1 | tee -i {log:q} >&2"

        REFERENCE = str(OUTPUT / "models" / "adapter")
    else:
        REFERENCE = str(Path(workflow.basedir, "data", "reference"))

    rule demo_aligned:
        input:
            base=rules.demo_base.output,
            adapter=REFERENCE,
        output:
            directory(OUTPUT / "models" / "aligned"),
        log:
            OUTPUT / "logs" / "demo_aligned.log",
        benchmark:
            OUTPUT / "benchmarks" / "demo_aligned.tsv"
        resources:
            mem_mb=4000,
            runtime=10,
        shell:
            "{PACT} demo aligned --base {input.base:q} --adapter {input.adapter:q} "
            "-o {output:q} 2> {log:q}"

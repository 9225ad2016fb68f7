import yaml


rule config_shown:
    output:
        OUTPUT / "config.yaml",
    localrule: True
    params:
        config=yaml.safe_dump(GIVEN.model_dump(mode="json"), sort_keys=False),
    shell:  # not `run`, which fails where the path of Python has a space
        "printf %s {params.config:q} > {output:q}"


# A dataset is scored where a run reads its targets; only then there is something to screen.
SCREENED = sorted({run.dataset for run in RUNS.values() if needs_targets(run)})


rule report:
    input:
        reference=rules.evaluate_reference.output,
        runs=[EVALUATED / "runs" / name for name in RUNS],
        screenings=[OUTPUT / "targets" / name / "screen.json" for name in SCREENED],
        tokens=rules.tokens.output,
        config=rules.config_shown.output,
        modules=[OUTPUT / "modules" / f"{adapter}.json" for adapter in ADAPTERS],
    output:
        page=OUTPUT / "report.html",
        summary=OUTPUT / "summary.txt",
    log:
        OUTPUT / "logs" / "report.log",
    localrule: True
    params:
        title=CONFIG.title,
        benchmarks=OUTPUT / "benchmarks",
        adapters=OUTPUT / "adapters",
        screenings=" ".join(
            f"--screening {shlex.quote(str(OUTPUT / 'targets' / name / 'screen.json'))}"
            for name in SCREENED
        ),
        metrics=" ".join(
            shlex.quote(str(folder / "metrics.json"))
            for folder in [EVALUATED / "reference", *(EVALUATED / "runs" / n for n in RUNS)]
        ),
    shell:
        "{PACT} report {params.metrics} -o {output.page:q} --title {params.title:q} "
        "--safety-tokens {input.tokens:q} --benchmarks {params.benchmarks:q} "
        "--adapters {params.adapters:q} {params.screenings} "
        "--config-file {input.config:q} > {output.summary:q} 2> {log:q}"

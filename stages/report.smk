import yaml


rule config_shown:
    output:
        OUTPUT / "config.yaml",
    localrule: True
    params:
        config=yaml.safe_dump(GIVEN.model_dump(mode="json"), sort_keys=False),
    shell:  # not `run`, which fails where the path of Python has a space
        "printf %s {params.config:q} > {output:q}"


rule report:
    input:
        reference=rules.evaluate_reference.output,
        runs=[EVALUATED / "runs" / name for name in CONFIG.runs],
        tokens=rules.tokens.output,
        config=rules.config_shown.output,
    output:
        page=OUTPUT / "report.html",
        summary=OUTPUT / "summary.txt",
    log:
        OUTPUT / "logs" / "report.log",
    localrule: True
    params:
        title=CONFIG.title,
        benchmarks=OUTPUT / "benchmarks",
        metrics=" ".join(
            shlex.quote(str(folder / "metrics.json"))
            for folder in [EVALUATED / "reference", *(EVALUATED / "runs" / n for n in CONFIG.runs)]
        ),
    shell:
        "{PACT} report {params.metrics} -o {output.page:q} --title {params.title:q} "
        "--safety-tokens {input.tokens:q} --benchmarks {params.benchmarks:q} "
        "--config-file {input.config:q} > {output.summary:q} 2> {log:q}"

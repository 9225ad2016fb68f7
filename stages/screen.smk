# Which rows the reference would have refused: read from the cache, for the report.
rule screen:
    input:
        targets=OUTPUT / "targets" / "{dataset}" / "targets.json",
        tokens=rules.tokens.output,
    output:
        OUTPUT / "targets" / "{dataset}" / "screen.json",
    log:
        OUTPUT / "logs" / "screen" / "{dataset}.log",
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        rows=rows_of,
        cache=f"--cache {shlex.quote(CACHE)}" if "://" in CACHE else "",
    shell:
        "{PACT} screen {input.targets:q} --safety-tokens {input.tokens:q} {params.rows} {params.cache} "
        "--top 50 --json > {output:q} 2> {log:q}"

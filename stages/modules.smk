# Whether the model has the modules that the runs' adapters are for. It is what runs first: nothing
# is to be scored for a run that cannot be. No stage waits for it, so that another run with other
# modules makes nothing anew.
OTHER_SETTINGS = set(RunConfig.model_fields) - set(LoraSettings.model_fields)


ADAPTERS = {
    hashlib.sha256(settings.encode()).hexdigest()[:12]: settings
    for settings in {
        options(run, without=OTHER_SETTINGS) for run in RUNS.values() if run.method == "lora"
    }
}


rule modules:
    input:
        model=model_input(ALIGNED),
    output:
        OUTPUT / "modules" / "{adapter}.json",
    log:
        OUTPUT / "logs" / "modules" / "{adapter}.log",
    priority: 100
    threads: JOB_CORES
    params:
        model=ALIGNED,
        settings=lambda wildcards: ADAPTERS[wildcards.adapter],
    shell:
        "{PACT} modules --json --model {params.model:q} {params.settings} 2> {log:q} > {output:q} "
        "|| {{ cat {log:q} >&2; exit 2; }}"

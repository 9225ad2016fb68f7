# Whether the model has the modules that the runs' adapters are for, before anything is scored.
LORA_SETTINGS = sorted(
    {
        options(run, without=set(type(run).model_fields) - set(LoraSettings.model_fields))
        for run in RUNS.values()
        if run.method == "lora"
    }
)


rule modules:
    input:
        model=model_input(ALIGNED),
    output:
        touch(OUTPUT / "modules.checked"),
    log:
        OUTPUT / "logs" / "modules.log",
    params:
        model=ALIGNED,
        settings=LORA_SETTINGS,
        commands=lambda wildcards: " && ".join(
            f"{PACT} modules --model {shlex.quote(str(ALIGNED))} {settings}"
            for settings in LORA_SETTINGS
        )
        or "true",
    shell:
        "( {params.commands} ) 2>&1 | tee -i {log:q} >&2"



def run_rows(wildcards):
    return local_files(CONFIG.datasets[RUNS[wildcards.run].dataset])


def needs_targets(run):
    """Plain fine-tuning needs no targets unless it leaves refused rows out, nor does one with the
    reference in memory."""
    is_plain = run.objective == "none" and run.refused_rows == "learn"
    return not is_plain and run.reference != "live"


def rehearses(run):
    """Whether a run mixes the reference's own answers in."""
    is_held = run.objective not in HOLD_NOTHING and run.reference != "live"
    is_meant = run.objective != "pact" or "rehearsal_share" in run.model_fields_set
    return CONFIG.rehearsal is not None and is_held and is_meant and run.rehearsal_share > 0


def targets_of(run):
    return OUTPUT / "targets" / run.dataset / "targets.json"


def run_targets(wildcards):
    run = RUNS[wildcards.run]
    if not needs_targets(run):
        return []
    return digest_of(targets_of(run), list(map(str, CONFIG.datasets[run.dataset])))


def run_tokens(wildcards):
    run = RUNS[wildcards.run]
    return rules.tokens.output if needs_targets(run) or run.reference == "live" else []


def run_rehearsal(wildcards):
    if not rehearses(RUNS[wildcards.run]):
        return []
    return digest_of(REHEARSAL, list(map(str, CONFIG.rehearsal.prompts)))


def targets_option(wildcards):
    run = RUNS[wildcards.run]
    if not run_tokens(wildcards):
        return ""
    given = {"--safety-tokens": rules.tokens.output[0]}
    if needs_targets(run):
        given["--targets"] = targets_of(run)
    if rehearses(run):
        given["--rehearsal"] = REHEARSAL
    return " ".join(repeated(option, [path]) for option, path in given.items())


def watched_files(wildcards):
    """The prompts, and the judge's file, of a run that answers prompts while it trains."""
    is_watched = RUNS[wildcards.run].evaluate_steps > 0
    return [*JUDGED_BY["prompts"], *JUDGED_BY["code"]] if is_watched else []


def watched_options(wildcards):
    if RUNS[wildcards.run].evaluate_steps == 0:
        return ""
    judges = {
        f"--{key.replace('_', '-')}": getattr(CONFIG.evaluate, key)
        for key in ("judge", "endpoint", "endpoint_model", "endpoint_prompt")
        if key == "judge" or CONFIG.evaluate.endpoint is not None
    }
    return f"{PROMPT_OPTIONS} {' '.join(repeated(k, [value]) for k, value in judges.items())}"


def finetune_means(wildcards):
    """What changes no adapter: how often it is saved, and that a remote cache may be read."""
    run = RUNS[wildcards.run]
    is_remote = needs_targets(run) and "://" in CACHE
    return f"--save-steps {run.save_steps}" + (f" --cache {shlex.quote(CACHE)}" if is_remote else "")


rule finetune:
    input:
        rows=run_rows,
        template=lambda wildcards: chat_template(RUNS[wildcards.run]),
        targets=run_targets,
        rehearsal=run_rehearsal,
        tokens=run_tokens,
        model=model_input(ALIGNED),
        code=lambda wildcards: own_code(RUNS[wildcards.run]),
        watched=watched_files,
    output:
        directory(OUTPUT / "adapters" / "{run}"),
    log:
        OUTPUT / "logs" / "finetune" / "{run}.log",
    benchmark:
        OUTPUT / "benchmarks" / "finetune" / "{run}.tsv"
    priority: TRAINING
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=720,
        gpu=0 if IS_DEMO else 1,
        means=finetune_means,
    params:
        model=ALIGNED,
        rows=lambda wildcards: repeated("--rows", CONFIG.datasets[RUNS[wildcards.run].dataset]),
        targets=targets_option,
        scored=lambda wildcards: SCORE_VALUES if needs_targets(RUNS[wildcards.run]) else "",
        watched=watched_options,
        settings=lambda wildcards: options(
            RUNS[wildcards.run], without=["dataset", "save_steps"]
        ),
    shell:
        "OMP_NUM_THREADS={threads} {PACT} finetune --model {params.model:q} {params.rows} "
        "{params.targets} -o {output:q} {params.settings} {params.watched} {resources.means} "
        "2>&1 | tee -i {log:q} >&2"


PROJECTED = CONFIG.projected_runs()


ruleorder: safe_lora > finetune


# A projection trains nothing: it is made of the adapter of another run.
rule safe_lora:
    input:
        adapter=lambda wildcards: OUTPUT / "adapters" / PROJECTED[wildcards.run],
        model=model_input(ALIGNED),
        base=model_input(BASE),
    output:
        directory(OUTPUT / "adapters" / "{run}"),
    log:
        OUTPUT / "logs" / "safe_lora" / "{run}.log",
    threads: JOB_CORES
    resources:
        mem_mb=6000,
        runtime=60,
    params:
        model=ALIGNED,
        base=BASE,
        threshold=lambda wildcards: RUNS[wildcards.run].safe_lora,
    wildcard_constraints:
        run="|".join(map(re.escape, PROJECTED)) or "(?!)",
    shell:
        "OMP_NUM_THREADS={threads} {PACT} safe-lora --model {params.model:q} "
        "--base {params.base:q} --adapter {input.adapter:q} -o {output:q} "
        "--threshold {params.threshold} 2>&1 | tee -i {log:q} >&2"

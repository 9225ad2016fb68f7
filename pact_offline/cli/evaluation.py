"""`pact-offline evaluate` and `report`."""

from __future__ import annotations

from pathlib import Path

import click

from pact_offline.cli.options import (
    FILE,
    FOLDER,
    MODEL,
    OUTPUT_FILE,
    OUTPUT_FOLDER,
    json_option,
    prompt_options,
    settings_options,
)
from pact_offline.settings.evaluate import EvaluateSettings


@click.command()
@click.option("--name", required=True, help="Name of the run in the report.")
@click.option("--model", type=MODEL, required=True, help="Model: path or NAME[@REVISION].")
@click.option(
    "--adapter",
    type=FOLDER,
    help="Directory from `pact-offline finetune` or `merge`: an adapter, or a whole model.",
)
@prompt_options
@click.option(
    "--safety-tokens",
    type=FILE,
    help="safety_tokens.json from `pact-offline tokens`; for drift on the harmful prompts.",
)
@click.option(
    "--reference",
    type=FOLDER,
    help="Directory of the reference's own evaluation (its -o); leave out for the reference.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FOLDER,
    required=True,
    help="Directory to write metrics.json into.",
)
@click.option(
    "--answers",
    "answers_folder",
    type=OUTPUT_FOLDER,
    help="Directory where answers are kept and looked up, those of `pact-offline answer` among "
    "them; they are made once for all judges. By default they are kept until the output is whole.",
)
@settings_options(EvaluateSettings)
@json_option
def evaluate(
    name: str,
    model: str,
    adapter: Path | None,
    harmful: str | None,
    borderline: str | None,
    benign: str | None,
    task: str | None,
    sets: tuple[str, ...],
    safety_tokens: Path | None,
    reference: Path | None,
    output: Path,
    answers_folder: Path | None,
    as_json: bool,
    settings: EvaluateSettings,
) -> None:
    """Measure a model's safety, utility and drift.

    Refusals in every set of prompts, task accuracy, and confidences against the reference's; what
    no prompts or safety tokens are given for is not measured. --task-scores says what a right
    answer is, --lm-eval names published tasks. A killed evaluation goes on with the answers that it
    has.

    Example: pact-offline evaluate --name sft --model A --adapter adapter --harmful harmful.jsonl
    --borderline borderline.jsonl --benign benign.jsonl --task test.jsonl
    --safety-tokens tokens.json --reference evaluation/reference -o evaluation/sft
    """
    from pact_offline.evaluation.evaluate import evaluate as run
    from pact_offline.evaluation.prompt_sets import parse_set

    metrics = run(
        name,
        model,
        adapter,
        {"harmful": harmful, "borderline": borderline, "benign": benign, "task": task},
        [parse_set(text) for text in sets],
        safety_tokens,
        output,
        settings,
        reference,
        answers_folder,
    )
    if as_json:
        click.echo(metrics.model_dump_json())
    else:
        width = max(20, *map(len, [*metrics.rates, *metrics.means]))
        for rate, found in metrics.rates.items():
            click.echo(
                f"{rate:{width}} {found.value:7.1%}  [{found.low:.1%}, {found.high:.1%}]  "
                f"{found.count}/{found.total}"
            )
        for what, mean in metrics.means.items():
            spread = "" if mean.low is None else f"  [{mean.low:.3f}, {mean.high:.3f}]"
            click.echo(f"{what:{width}} {mean.value:7.3f}{spread}  of {mean.total}")


@click.command()
@click.option("--model", type=MODEL, required=True, help="Model: path or NAME[@REVISION].")
@click.option(
    "--adapter",
    "adapters",
    type=FOLDER,
    multiple=True,
    help="Directory from `pact-offline finetune` or `merge`, to answer too; may be repeated.",
)
@prompt_options
@click.option(
    "--answers",
    "folder",
    type=OUTPUT_FOLDER,
    required=True,
    help="Directory where answers are kept, for `pact-offline evaluate --answers`.",
)
@settings_options(EvaluateSettings)
def answer(
    model: str,
    adapters: tuple[Path, ...],
    harmful: str | None,
    borderline: str | None,
    benign: str | None,
    task: str | None,
    sets: tuple[str, ...],
    folder: Path,
    settings: EvaluateSettings,
) -> None:
    """Answer prompts by a model and by adapters on it, with one engine.

    What `evaluate` would answer by vLLM, run by run, for all of them at once; give it the same
    settings. What vLLM does not answer is left to it.

    Example: pact-offline answer --model A --adapter sft --adapter hold --harmful harmful.jsonl
    --answers answers
    """
    from pact_offline.evaluation.answer import answer as run
    from pact_offline.evaluation.prompt_sets import parse_set

    asked = {"harmful": harmful, "borderline": borderline, "benign": benign, "task": task}
    found = run(model, adapters, asked, [parse_set(text) for text in sets], folder, settings)
    for name, place in found.items():
        click.echo(f"{name}: {place or 'left to evaluate'}")


@click.command()
@click.argument("metrics", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="report.html to write.")
@click.option("--title", default="PACT from a cache", help="Title of the page.")
@click.option("--safety-tokens", type=FILE, help="safety_tokens.json, to show on the page.")
@click.option(
    "--benchmarks",
    type=FOLDER,
    help="Directory of Snakemake benchmark files: time and memory of each stage.",
)
@click.option(
    "--adapters", type=FOLDER, help="Directory of adapters, named as the runs: how they trained."
)
@click.option(
    "--screening",
    type=FILE,
    multiple=True,
    help="A dataset's rows as `pact-offline screen --json` lists them; may be repeated.",
)
@click.option("--config-file", type=FILE, help="Workflow config to show on the page.")
@click.option(
    "--tables", type=OUTPUT_FOLDER, help="Directory for the results as CSV, Markdown, TeX and JSON."
)
@click.option(
    "--compare",
    type=FILE,
    multiple=True,
    help="metrics.json that was evaluated otherwise, shown below the others; may be repeated.",
)
def report(
    metrics: tuple[Path, ...],
    output: Path,
    title: str,
    safety_tokens: Path | None,
    benchmarks: Path | None,
    adapters: Path | None,
    screening: tuple[Path, ...],
    config_file: Path | None,
    tables: Path | None,
    compare: tuple[Path, ...],
) -> None:
    """Make one page of many metrics.json.

    The reference's comes first. Answers are read from the answers.jsonl beside each metrics.json.

    Example: pact-offline report evaluation/*/metrics.json -o report.html
    """
    from pact_offline.files import read_text
    from pact_offline.report.answers import read_answers
    from pact_offline.report.inputs import read_metrics, read_screening, read_tokens
    from pact_offline.report.otherwise import read_otherwise
    from pact_offline.report.page import headline, in_order, write_report
    from pact_offline.report.tables import require_tables_place, write_tables

    loaded = read_metrics(metrics)
    others = read_otherwise(compare, loaded)
    if tables:
        require_tables_place(tables, output)
    write_report(
        loaded,
        output,
        title=title,
        safety_tokens=read_tokens(safety_tokens, loaded) if safety_tokens else None,
        benchmarks=benchmarks,
        config_text=read_text(config_file) if config_file else None,
        adapters=adapters,
        screenings=[read_screening(path) for path in screening],
        answers=read_answers(metrics, loaded),
        others=others,
    )
    if tables:
        write_tables(tables, in_order(loaded), others)
    click.echo("\n".join([*headline(loaded), f"report: {output}"]))

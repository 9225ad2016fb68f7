"""`pact-offline bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pact_offline.cli.options import (
    FILE,
    MODEL,
    ROWS,
    cache_option,
    json_option,
    rows_option,
    safety_tokens_option,
    settings_options,
)
from pact_offline.settings.stages import FinetuneSettings, ScoreSettings


@click.group()
def bench() -> None:
    """Measure on your own model and rows."""


@bench.command("equality")
@click.option(
    "--model",
    type=MODEL,
    required=True,
    help="Reference, and model to fine-tune: path or NAME[@REVISION].",
)
@rows_option
@click.option(
    "--targets", type=FILE, multiple=True, required=True, help="targets.json; may be repeated."
)
@safety_tokens_option
@cache_option
@settings_options(FinetuneSettings)
@json_option
def bench_equality(
    model: str,
    rows: tuple[str, ...],
    targets: tuple[Path, ...],
    safety_tokens: Path,
    cache: str | None,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Compare training from caches and a live reference.

    The largest difference of a step's loss, and of a trained weight at the end.

    Example: pact-offline bench equality --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json --dtype float32 --lora-dropout 0
    """
    from dataclasses import asdict

    from pact_offline.bench.equality import equality, table
    from pact_offline.references import locate_reference

    found = equality(locate_reference(model), rows, targets, safety_tokens, settings, cache=cache)
    click.echo(json.dumps([asdict(one) for one in found]) if as_json else table(found))


@bench.command("cache")
@click.option(
    "--steps",
    type=click.IntRange(min=32, max=10**9),
    default=10_000_000,
    help="Response steps of the store made.",
)
@click.option("--targets", type=FILE, help="Targets stored as float32, to compare encodings on.")
@click.option("--policy", type=FILE, help="Targets of another model for the same rows.")
@click.option("--safety-tokens", type=FILE, help="safety_tokens.json from `pact-offline tokens`.")
@cache_option
@json_option
def bench_cache(
    steps: int,
    targets: Path | None,
    policy: Path | None,
    safety_tokens: Path | None,
    cache: str | None,
    as_json: bool,
) -> None:
    """Time a large store; compare encodings.

    Encodings are compared on --targets: their size, and the change of the loss.

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
    sizes = []
    if targets is not None and policy is not None and safety_tokens is not None:
        import torch

        from pact_offline.cache.targets import TargetCache
        from pact_offline.safety_tokens.file import SafetyTokens

        weights = torch.from_numpy(SafetyTokens.load(safety_tokens).weights)
        opened, ours = (TargetCache.open(path, cache=cache) for path in (targets, policy))
        sizes = measure_encodings(opened, ours, weights)
    reading = [measure_reading("uint8", steps), measure_reading("float16", steps)]
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


@bench.command("train")
@click.option(
    "--model",
    type=MODEL,
    required=True,
    help="Reference, and model to fine-tune: path or NAME[@REVISION].",
)
@rows_option
@click.option("--targets", type=FILE, required=True, help="targets.json of these rows.")
@safety_tokens_option
@cache_option
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Measured steps of a run.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each way.")
@click.option(
    "--published-steps",
    type=click.IntRange(min=0),
    default=2,
    help="Measured steps of the published way, which is slow; 0 leaves it out.",
)
@settings_options(FinetuneSettings)
@json_option
def bench_train(
    model: str,
    rows: tuple[str, ...],
    targets: Path,
    safety_tokens: Path,
    cache: str | None,
    steps: int,
    repeats: int,
    published_steps: int,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Time training from the cache against other ways.

    The others: plain fine-tuning, a live reference, and the published way.

    Example: pact-offline bench train --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json
    """
    from dataclasses import asdict

    from pact_offline.bench.train import measure_training, training_table
    from pact_offline.models.locate import locate_model

    found = measure_training(
        locate_model(model),
        rows,
        targets,
        safety_tokens,
        settings,
        steps=steps,
        repeats=repeats,
        published_steps=published_steps,
        cache=cache,
    )
    click.echo(json.dumps(asdict(found)) if as_json else training_table(found))


@bench.command("score")
@click.option(
    "--model", type=MODEL, required=True, help="Reference model: path or NAME[@REVISION]."
)
@rows_option
@safety_tokens_option
@settings_options(ScoreSettings)
@json_option
def bench_score(
    model: str,
    rows: tuple[str, ...],
    safety_tokens: Path,
    as_json: bool,
    settings: ScoreSettings,
) -> None:
    """Time scoring by each backend and by a script.

    Both backends of this project, vLLM's own `prompt_logprobs`, and a row-by-row script.

    Example: pact-offline bench score --model A --rows train.jsonl --safety-tokens tokens.json
    """
    from dataclasses import asdict

    from pact_offline.bench.score import measure_scoring, scoring_table
    from pact_offline.models.locate import locate_model

    found = measure_scoring(locate_model(model), rows, safety_tokens, settings)
    click.echo(json.dumps(asdict(found)) if as_json else scoring_table(found))


@bench.command("rows")
@click.option("--model", type=MODEL, required=True, help="Model whose tokenizer reads them.")
@click.option(
    "--rows", type=ROWS, required=True, help="Rows that are repeated, with a number in front."
)
@safety_tokens_option
@click.option(
    "--count",
    "counts",
    type=click.IntRange(min=1000),
    multiple=True,
    default=(10_000, 100_000),
    help="How many; may be repeated.",
)
@settings_options(FinetuneSettings)
@json_option
def bench_rows(
    model: str,
    rows: str,
    safety_tokens: Path,
    counts: tuple[int, ...],
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Time what is done with rows before a model runs.

    Preparing `score`, recognising rows that are known, and the start of `finetune`, for any count.

    Example: pact-offline bench rows --model A --rows train.jsonl --safety-tokens tokens.json
    --count 1000000
    """
    from dataclasses import asdict

    from pact_offline.bench.rows import measure_rows, rows_table

    found = measure_rows(model, rows, safety_tokens, counts, settings)
    click.echo(json.dumps([asdict(one) for one in found]) if as_json else rows_table(found))

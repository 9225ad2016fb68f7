"""`pact-offline tokens`, `score` and `rehearse`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pact_offline.cli.options import (
    FILE,
    MODEL,
    OUTPUT_FILE,
    ROW_SOURCES,
    ROWS,
    STORES,
    adapter_option,
    json_option,
    rows_option,
    safety_tokens_option,
    settings_options,
)
from pact_offline.errors import Interrupted
from pact_offline.settings.stages import (
    RehearseSettings,
    ScoreSettings,
    TokensSettings,
)


@click.command()
@click.option(
    "--aligned", type=MODEL, required=True, help="Aligned model: path or NAME[@REVISION]."
)
@click.option("--base", type=MODEL, help="Its base model: path or NAME[@REVISION].")
@click.option(
    "--refusals",
    type=ROWS,
    help=f"Harmful prompts with refusals as responses: {ROW_SOURCES}.",
)
@click.option(
    "--from-list",
    type=FILE,
    help="A hand-made list instead, JSON: words, ids, or pairs of one with its weight.",
)
@click.option(
    "-o", "--output", type=OUTPUT_FILE, required=True, help="safety_tokens.json to write."
)
@settings_options(TokensSettings)
@json_option
@adapter_option("aligned")
def tokens(
    aligned: str,
    base: str | None,
    refusals: str | None,
    from_list: Path | None,
    output: Path,
    as_json: bool,
    settings: TokensSettings,
) -> None:
    """Find the safety tokens of a pair of models.

    The ids whose confidence tells an aligned model from its base; or a hand-made list of them.

    Example: pact-offline tokens --aligned A --base B --refusals refusals.jsonl -o tokens.json
    """
    from pact_offline.progress import bar
    from pact_offline.rows.read import read_rows
    from pact_offline.safety_tokens.hand_list import read_hand_list
    from pact_offline.safety_tokens.search import find_safety_tokens

    if from_list is not None and base is None and refusals is None:
        found = read_hand_list(from_list, aligned)
    elif from_list is None and base is not None and refusals is not None:
        rows = read_rows(refusals, columns=settings.columns)
        passes = 3 if settings.mode == "pref_logratio" else 2
        total = passes * min(len(rows), settings.examples)
        with bar("reading refusals", total, "pairs") as progress:
            found = find_safety_tokens(aligned, base, rows, settings, progress.update)
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
    if found := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value):
        index, count = map(int, found.groups())
        if 1 <= index <= count:
            return index, count
    raise click.BadParameter(f"expected I/N with 1 <= I <= N, found {value!r:.40}")


@click.command()
@click.option(
    "--model", type=MODEL, required=True, help="Reference model: path or NAME[@REVISION]."
)
@rows_option
@safety_tokens_option
@click.option(
    "--cache",
    type=STORES,
    required=True,
    help="Directory of stores, or an fsspec URL (s3://...); shareable.",
)
@click.option("-o", "--output", type=OUTPUT_FILE, help="targets.json to write.")
@click.option(
    "--part",
    metavar="I/N",
    callback=parse_part,
    help="Score the I-th of N parts only, and write no targets.json: for jobs that share the work; "
    "a last one without --part writes it.",
)
@settings_options(ScoreSettings)
@json_option
@adapter_option("model")
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

    from pact_offline.references import locate_reference
    from pact_offline.scoring.score import score as run

    if (output is None) == (part is None):
        raise click.UsageError("expected either --output or --part I/N")
    files = locate_reference(model)
    try:
        summary = run(files, rows, safety_tokens, cache, settings, output=output, part=part)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what was scored is in the cache, and the same command goes on from there"
        ) from None
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        click.echo(
            f"{summary.rows} rows, {summary.contexts} contexts: {summary.shared} shared, "
            f"{summary.known} known, {summary.scored} scored ({summary.tokens} tokens, "
            f"{summary.backend})\nstore: {summary.store}"
        )


@click.command()
@click.option(
    "--model", type=MODEL, required=True, help="Reference model: path or NAME[@REVISION]."
)
@click.option(
    "--prompts",
    type=ROWS,
    multiple=True,
    required=True,
    help=f"Prompts for it to answer, harmful and harmless: {ROW_SOURCES}; answers in them are not "
    "read; may be repeated.",
)
@safety_tokens_option
@click.option(
    "--cache", type=STORES, required=True, help="Directory of stores, or an fsspec URL (s3://...)."
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FILE,
    required=True,
    help="targets.json to write; its rows go to NAME.answers.jsonl beside it.",
)
@settings_options(RehearseSettings)
@json_option
@adapter_option("model")
def rehearse(
    model: str,
    prompts: tuple[str, ...],
    safety_tokens: Path,
    cache: str,
    output: Path,
    as_json: bool,
    settings: RehearseSettings,
) -> None:
    """Let the reference answer prompts, and score that.

    `finetune --rehearsal` mixes them into every batch, and holds the policy there. Made once for a
    reference, for any dataset and run.

    Example: pact-offline rehearse --model A --prompts data/rehearsal.jsonl
    --safety-tokens tokens.json --cache cache -o rehearsal.json
    """
    from dataclasses import asdict

    from pact_offline.references import locate_reference
    from pact_offline.scoring.rehearse import rehearse as run

    summary = run(locate_reference(model), prompts, safety_tokens, cache, settings, output)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        click.echo(
            f"{summary.rows} answers, {summary.contexts} contexts: {summary.known} known, "
            f"{summary.scored} scored ({summary.backend})\nstore: {summary.store}"
        )

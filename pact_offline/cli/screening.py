"""`pact-offline screen`."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click

from pact_offline.cli.options import (
    FILE,
    OUTPUT_FILE,
    ROW_SOURCES,
    ROWS,
    Number,
    cache_option,
    json_option,
    safety_tokens_option,
)

_SHOWN = 20


@click.command()
@click.argument("targets", type=FILE)
@safety_tokens_option
@cache_option
@click.option(
    "--rows",
    type=ROWS,
    multiple=True,
    help="The rows, where they are not where they were when they were scored, or of the hub: "
    f"{ROW_SOURCES}; may be repeated.",
)
@click.option(
    "--above",
    type=Number(0, 1),
    default=0.5,
    help="The model would have refused an answer where its weighted safety tokens have more than "
    "this probability together at the first step.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FILE,
    multiple=True,
    help="Write the rows without those that it would have refused, in the format that they have "
    "(those of the hub as Parquet); one for each of their files.",
)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    help=f"Answers to list, the likeliest refused first. Default: {_SHOWN} in the table, else all.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the answers as CSV.")
@json_option
def screen(
    targets: Path,
    safety_tokens: Path,
    cache: str | None,
    rows: tuple[str, ...],
    above: float,
    output: tuple[Path, ...],
    top: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """List the rows that the aligned model would have refused.

    Read from the cache: how likely a refusal was to the reference at the first step of each answer,
    and how likely it finds the answer. Loads no model.

    Example: pact-offline screen targets.json --safety-tokens tokens.json --above 0.5
    -o kept.jsonl
    """
    from pact_offline.cache.screen import ScreenedTurn, Screening, table
    from pact_offline.cache.targets import TargetCache
    from pact_offline.safety_tokens.file import SafetyTokens

    if as_csv and as_json:
        raise click.UsageError("expected --csv or --json, found both")
    tokens = SafetyTokens.load(safety_tokens)
    opened = TargetCache.open(targets, cache=cache)
    opened.check_safety_ids(tokens.ids, str(safety_tokens))
    found = Screening(opened, tokens.weights, rows)
    written = found.write_others(above, output) if output else []
    if as_json:
        click.echo(json.dumps(found.to_dict(above, top), ensure_ascii=False))
    elif as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(ScreenedTurn.__dataclass_fields__)
        writer.writerows(asdict(turn).values() for turn in found.top(top))
    else:
        shown = _SHOWN if top is None else top
        click.echo(table(found, above, shown, shutil.get_terminal_size((120, 24)).columns))
    for file, (kept, read) in zip(output, written, strict=True):
        click.echo(f"{file}: {kept:,} of {read:,} rows", err=True)

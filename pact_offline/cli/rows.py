"""`pact-offline rows`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from pact_offline.cli.options import MODEL, ROW_SOURCES, ROWS, json_option, settings_options
from pact_offline.settings.stages import RowSettings


@click.command()
@click.argument("files", type=ROWS, nargs=-1, required=True, metavar="FILE...")
@click.option("--model", type=MODEL, required=True, help="Model whose tokenizer reads them.")
@click.option("--show", type=click.IntRange(min=0), default=0, help="Rows to show, decoded.")
@settings_options(RowSettings)
@json_option
def rows(
    files: tuple[str, ...], model: str, show: int, as_json: bool, settings: RowSettings
) -> None:
    """Show what is in rows, and what of them is trained.

    Loads a tokenizer and no model. Counts what cannot be used, also where it would be refused.

    Example: pact-offline rows train.jsonl --model A --show 2
    """
    from pact_offline.rows.chat import chat_of
    from pact_offline.rows.describe import describe, table

    found = describe(model, files, settings, chat_of(model, settings), show)
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    click.echo(table(found))
    for row in found.shown:
        click.echo(f"\n{row['origin']}{' (cut)' if row['is_cut'] else ''}\n{_marked(row)}")


def _marked(row: dict[str, Any]) -> str:
    """A row's text, its trained parts in green, or in brackets where there are no colours."""
    from pact_offline.texts import printable

    parts = []
    for text, is_trained in row["pieces"]:
        said = printable(text)
        if is_trained:
            said = click.style(said, fg="green") if sys.stdout.isatty() else f"⟦{said}⟧"
        parts.append(said)
    return "".join(parts)


rows.help = f"{rows.help}\n\n    FILE: {ROW_SOURCES}."

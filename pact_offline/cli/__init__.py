"""The command line. Heavy modules are imported inside the commands."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
from typing import Any

import click

from pact_offline import __version__
from pact_offline.cli import bench, cache, demo, evaluation, rows, scoring, screening, training
from pact_offline.cli.lifetime import end_with_another
from pact_offline.cli.own_places import with_own_places
from pact_offline.errors import Interrupted, PactError, first_line
from pact_offline.files import is_text
from pact_offline.machine import allowed_cores, usable_cores

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class Commands(click.Group):
    """Turns errors that a user can mend into one line and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for text in args:
            if not is_text(text):
                raise click.UsageError(f"expected Unicode text without NUL, found {text!r:.80}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PactError as error:
            if ctx.params.get("verbose"):
                raise
            click.echo(f"pact-offline: {one_line(str(error))}", err=True)
            ctx.exit(2)
        except RuntimeError as error:
            line = _out_of_memory(error, ctx.invoked_subcommand)
            if line is None or ctx.params.get("verbose"):
                raise
            click.echo(f"pact-offline: {one_line(line)}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt as stop:
            said = str(stop) if isinstance(stop, Interrupted) else "interrupted"
            click.echo(f"pact-offline: {one_line(said)}", err=True)
            ctx.exit(130)


_NEEDS_LESS = {
    "finetune": "a lower --pass-tokens, which keeps the gradient, --gradient-checkpointing, "
    "or --load-in 4bit",
    "score": "a lower --batch-tokens",
    "answer": "a lower --batch-size",
    "evaluate": "a lower --batch-size",
}


def _out_of_memory(error: RuntimeError, command: str | None) -> str | None:
    """What to say where an accelerator's memory does not suffice; None: that is not the error."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    less = _NEEDS_LESS.get(command or "")
    advice = f"; it needs less with {less}" if less else ""
    found = ". ".join(first_line(error).split(". ")[:2])  # what follows names every process
    return f"expected enough memory on the accelerator, found: {found}{advice}"


def one_line(text: str) -> str:
    """A text with what would break its line, or play with a terminal, written out."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda odd: repr(odd[0])[1:-1], text)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.option("-v", "--verbose", is_flag=True, help="More log lines, and tracebacks.")
@click.version_option(__version__, prog_name="pact-offline")
def cli(verbose: bool) -> None:
    """Fine-tune chat models without losing their refusals, from confidences that were scored once.

    The usual order: rows, tokens, score, screen, rehearse, finetune, evaluate, report.
    """
    end_with_another()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    # On some CPUs it warns, when peft imports it, of a package that it would load code with.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("pact_offline").setLevel(logging.DEBUG if verbose else logging.INFO)


for command in (
    rows.rows,
    scoring.tokens,
    scoring.score,
    screening.screen,
    scoring.rehearse,
    training.modules,
    training.finetune,
    training.merge,
    training.safe_lora,
    evaluation.answer,
    evaluation.evaluate,
    evaluation.report,
    demo.demo,
    cache.cache,
    bench.bench,
):
    cli.add_command(with_own_places(command))


def prepare_environment() -> None:
    """Set, before torch loads, what serves its threads on a machine that others use too.

    What the user or a scheduler has set stays.
    """
    # Threads that wait by spinning make a step ten times as long where another process has a core.
    chosen = {"OMP_WAIT_POLICY": "passive"}
    if (cores := usable_cores()) < allowed_cores():
        chosen["OMP_NUM_THREADS"] = str(cores)
    # On a CPU, oneDNN keeps scratch memory for each of the last 1024 shapes of products, and every
    # batch has another. 64 serve a pass through a model.
    chosen |= dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "64")
    for variable, value in chosen.items():
        os.environ.setdefault(variable, value)


def main() -> None:
    """Entry point of the console script."""
    # A job that is cancelled still closes what it opened: a shard, an engine's processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prepare_environment()
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

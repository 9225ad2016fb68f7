"""`pact-offline cache`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from pact_offline.cli.options import (
    FILE,
    MODEL,
    ROW_SOURCES,
    ROWS,
    STORES,
    Number,
    adapter_option,
    cache_option,
    json_option,
    rows_option,
    safety_tokens_option,
    settings_options,
)
from pact_offline.errors import StoreError
from pact_offline.settings.stages import AuditSettings


@click.group()
def cache() -> None:
    """List, show, check and clean stores of targets."""


@cache.command("ls")
@click.argument("directory", type=STORES)
@json_option
def cache_ls(directory: str, as_json: bool) -> None:
    """List stores: size, model, and who uses them.

    Example: pact-offline cache ls cache
    """
    from pact_offline.cache.inspect import list_stores

    stores = list_stores(directory)
    if as_json:
        click.echo(json.dumps(stores))
        return
    for store in stores:
        if "error" in store:
            click.echo(f"{store['name']}  {store['error']}")
            continue
        click.echo(
            f"{store['name']}  {store['shards']} shards, {store['contexts']} contexts, "
            f"{store['steps']} steps, {store['bytes'] / 2**20:.1f} MiB  ({store['model']}; "
            f"{store['engine']}, {store['compute_dtype']}, stored {store['stored_dtype']})"
        )
        for usage in store["used_by"]:
            gone = "  (gone)" if usage["missing"] else ""
            click.echo(f"  used by {usage['targets']}, {usage['rows']} rows{gone}")
        for line in store["strays"]:
            click.echo(f"  {line}")


@cache.command("show")
@click.argument("targets", type=FILE)
@click.argument("row", type=int)
@safety_tokens_option
@cache_option
@click.option(
    "--rows",
    type=ROWS,
    multiple=True,
    help=f"The targets' rows, to show the response's tokens: {ROW_SOURCES}; may be repeated.",
)
@click.option(
    "--model", type=MODEL, help="The model whose tokenizer reads them: path or NAME[@REVISION]."
)
@click.option("--chat-template", type=FILE, help="File with the template they were scored with.")
@click.option("--columns", type=int, default=8, help="Safety tokens to show, the likeliest.")
def cache_show(
    targets: Path,
    row: int,
    safety_tokens: Path,
    cache: str | None,
    rows: tuple[str, ...],
    model: str | None,
    chat_template: Path | None,
    columns: int,
) -> None:
    """Show one row (from 0), step by step.

    Example: pact-offline cache show targets.json 3 --safety-tokens tokens.json
    --rows train.jsonl --model A
    """
    from pact_offline.cache.show import show_row
    from pact_offline.cache.targets import TargetCache
    from pact_offline.safety_tokens.file import SafetyTokens

    if bool(rows) != bool(model):
        raise click.UsageError("expected both --rows and --model, or neither")
    opened = TargetCache.open(targets, cache=cache)
    tokens = SafetyTokens.load(safety_tokens)
    opened.check_safety_ids(tokens.ids, str(safety_tokens))
    response: list[str] = []
    numbers: list[int] = []
    if model:
        from pact_offline.rows.chat import chat_of
        from pact_offline.rows.tokenized import tokenized_by

        chosen = opened.binding.row_settings.model_copy(
            update={"chat_template": str(chat_template) if chat_template else None}
        )
        chat = chat_of(model, chosen)
        opened.check_chat(chat.template_sha256, chat.template_kwargs)
        tokenized = tokenized_by(chat, rows, chosen)
        opened.check_rows(tokenized, chosen)
        if 0 <= row < len(tokenized):
            example = tokenized[row]
            response = [chat.tokenizer.decode([i]) for i in example.ids[example.trained]]
            numbers = example.step_numbers.tolist()
    texts = [token.text for token in tokens.tokens]
    click.echo(show_row(opened, row, texts, response, numbers, columns))


@cache.command("verify")
@click.argument("path", type=STORES)
@click.option("--repair", is_flag=True, help="Drop the shards of a store that are not whole.")
@cache_option
def cache_verify(path: str, repair: bool, cache: str | None) -> None:
    """Check every byte.

    Of a store, of all stores in a directory, or of what a targets.json needs.

    Exit code 1 where something is not whole.

    Example: pact-offline cache verify targets.json
    """
    from pact_offline.cache.inspect import drop_shards, require_stores, verify_store, verify_targets

    if "://" not in path and Path(path).is_file():
        if repair:
            raise click.UsageError("--repair: expected a store or a directory of stores")
        found = verify_targets(Path(path), cache)
        click.echo(f"{path}: {found.shards} shards with {found.contexts} contexts are whole")
        return
    is_whole = True
    for place in require_stores(path):
        try:
            found = verify_store(place)
        except StoreError as error:
            if place == path:
                raise
            click.echo(str(error))
            is_whole = False
            continue
        click.echo(f"{place}: {found.shards} shards with {found.contexts} contexts are whole")
        for line in (*found.bad.values(), *found.strays):
            click.echo(line)
        if found.bad and repair:
            drop_shards(place, list(found.bad))
            click.echo(
                f"{place}: {len(found.bad)} shards dropped; `pact-offline score` fills the gap"
            )
        is_whole = is_whole and (repair or not found.bad)
    if not is_whole:
        sys.exit(1)


@cache.command("digest")
@click.argument("targets", type=FILE)
def cache_digest(targets: Path) -> None:
    """Print what a training takes from a targets.json, as a SHA-256.

    The same rows that are scored again by the same model, in whatever shards, give the same.

    Example: pact-offline cache digest targets.json
    """
    from pact_offline.cache.targets import Binding

    click.echo(Binding.load(targets).digest)


@cache.command("audit")
@click.argument("targets", type=FILE)
@click.option(
    "--model", type=MODEL, required=True, help="The model that was scored: path or NAME[@REVISION]."
)
@rows_option
@safety_tokens_option
@cache_option
@settings_options(AuditSettings)
@json_option
@adapter_option("model")
def cache_audit(
    targets: Path,
    model: str,
    rows: tuple[str, ...],
    safety_tokens: Path,
    cache: str | None,
    as_json: bool,
    settings: AuditSettings,
) -> None:
    """Score a sample again, another way.

    The difference to what is stored is held against the noise of the cache's compute dtype. Exit
    code 1 past the tolerance.

    Example: pact-offline cache audit targets.json --model A --rows train.jsonl
    --safety-tokens tokens.json
    """
    from pact_offline.references import locate_reference
    from pact_offline.scoring.audit import audit

    found = audit(locate_reference(model), rows, targets, safety_tokens, settings, cache=cache)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo(f"{found.contexts} contexts, {found.steps} steps, scored by {found.scored_by}")
        click.echo(f"{'log-confidences':28} {'mean':>10} {'p99':>10} {'max':>10}")
        for name, spread in (
            ("stored - scored", found.difference),
            ("noise", found.noise),
            ("own tokens", found.label_difference),
            ("noise of these", found.label_noise),
        ):
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
@click.argument("directory", type=STORES)
@click.option("--forget-missing", is_flag=True, help="Forget targets.json files that are gone.")
@click.option(
    "--older-than",
    type=Number(min=0),
    default=24,
    help="Hours; what is younger stays.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_gc(directory: str, forget_missing: bool, older_than: float, yes: bool) -> None:
    """Remove what no targets.json uses, after asking.

    A store remembers each targets.json that was bound to it. Leftovers of killed writers go too. A
    store that a job is filling or binding is left alone.

    Example: pact-offline cache gc cache
    """
    from pact_offline.cache.format import strays
    from pact_offline.cache.garbage import find_garbage, remove_garbage
    from pact_offline.cache.inspect import store_places
    from pact_offline.cache.leases import users
    from pact_offline.cache.storage import open_storage

    found = {}
    for place in store_places(directory):
        storage = open_storage(place)
        try:
            if using := users(storage):
                click.echo("\n".join(f"{place}: {user}; left alone" for user in using))
                continue
            garbage = find_garbage(
                storage, forget_missing=forget_missing, older_than=3600 * older_than
            )
        except StoreError as error:
            if place == directory:
                raise
            click.echo(str(error), err=True)
            continue
        for line in strays(storage):
            click.echo(line, err=True)
        leftovers = len(garbage.leftovers) + len(garbage.signs)
        if garbage.shards or garbage.records or leftovers:
            found[place] = (storage, garbage)
            click.echo(
                f"{place}: {len(garbage.shards)} unused shards, {leftovers} leftovers "
                f"({garbage.size / 2**20:.1f} MiB), {len(garbage.records)} bindings that are gone"
            )
    if not found:
        click.echo(f"{directory}: nothing to remove")
        return
    if not yes and not click.confirm("Remove them?", err=True):
        click.echo("nothing removed")
        return
    for place, (storage, garbage) in found.items():
        for user in remove_garbage(storage, garbage).users:
            click.echo(f"{place}: {user}; what was left is left alone")
    click.echo("removed")


@cache.command("references")
@click.option(
    "--remove", is_flag=True, help="Remove those that were not used lately, after asking."
)
@click.option(
    "--older-than",
    type=Number(min=0),
    default=30,
    help="Days; what was used since stays.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_references(remove: bool, older_than: float, yes: bool) -> None:
    """List the models that were added up with an adapter (MODEL+ADAPTER), and remove them.

    They are in this user's cache, each as large as its model, and made again when they are needed.

    Example: pact-offline cache references --remove --older-than 7
    """
    from pact_offline.references import kept_references, remove_reference

    now = time.time()
    kept = kept_references()
    for one in kept:
        days = (now - one.used) / 86400
        click.echo(
            f"{one.folder}: {one.size / 2**30:.2f} GiB, used {days:.1f} days ago: {one.name}"
        )
    old = [one for one in kept if now - one.used >= 86400 * older_than]
    if not kept or (remove and not old):
        click.echo("nothing to remove" if remove else "no model is kept")
        return
    if not remove:
        return
    size = sum(one.size for one in old) / 2**30
    if not yes and not click.confirm(f"Remove {len(old)} of them ({size:.2f} GiB)?", err=True):
        click.echo("nothing removed")
        return
    for one in old:
        remove_reference(one)
    click.echo("removed")

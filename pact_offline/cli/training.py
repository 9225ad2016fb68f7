"""`pact-offline finetune`, `modules` and `merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pact_offline.cli.options import (
    FILE,
    FOLDER,
    MODEL,
    OUTPUT_FOLDER,
    adapter_option,
    cache_option,
    json_option,
    prompt_options,
    rows_option,
    settings_options,
)
from pact_offline.errors import SettingError
from pact_offline.settings.evaluate import BUILT_IN_JUDGE
from pact_offline.settings.stages import (
    Dtype,
    FinetuneSettings,
    LoraSettings,
    SafeLoraSettings,
)

if TYPE_CHECKING:
    from pact_offline.evaluation.watch import PromptWatch


@click.command()
@click.option(
    "--model",
    type=MODEL,
    required=True,
    help="Model to fine-tune, the scored reference itself: path or NAME[@REVISION].",
)
@rows_option
@click.option("--targets", type=FILE, help="targets.json of these rows; not for --objective none.")
@click.option("--safety-tokens", type=FILE, help="safety_tokens.json from `pact-offline tokens`.")
@click.option(
    "--rehearsal",
    type=FILE,
    help="targets.json from `pact-offline rehearse`, to mix in; not with `pact`.",
)
@cache_option
@prompt_options
@click.option(
    "--judge",
    default=BUILT_IN_JUDGE,
    help="What a refusal is, with --evaluate-steps; as of `pact-offline evaluate`.",
)
@click.option("--endpoint", help="URL of a second judge, as of `pact-offline evaluate`.")
@click.option("--endpoint-model", help="Name of the second judge there.")
@click.option("--endpoint-prompt", help="What the second judge is asked: rubric, or a YAML file.")
@click.option(
    "-o", "--output", type=OUTPUT_FOLDER, required=True, help="Directory of the adapter, to write."
)
@settings_options(FinetuneSettings)
@json_option
@adapter_option("model")
def finetune(
    model: str,
    rows: tuple[str, ...],
    targets: Path | None,
    safety_tokens: Path | None,
    rehearsal: Path | None,
    cache: str | None,
    harmful: str | None,
    borderline: str | None,
    benign: str | None,
    task: str | None,
    sets: tuple[str, ...],
    judge: str,
    endpoint: str | None,
    endpoint_model: str | None,
    endpoint_prompt: str | None,
    output: Path,
    as_json: bool,
    settings: FinetuneSettings,
) -> None:
    """Fine-tune from cached targets.

    No reference model is loaded (but see --reference). Prompts (--harmful and the like) are
    answered while the policy trains, with --evaluate-steps.

    Example: pact-offline finetune --model A --rows train.jsonl --targets targets.json
    --safety-tokens tokens.json --rehearsal rehearsal.json -o adapter
    """
    from pact_offline.references import locate_reference
    from pact_offline.training.finetune import finetune as run
    from pact_offline.training.finetune import is_first_process

    files = locate_reference(model)
    prompts = {"harmful": harmful, "borderline": borderline, "benign": benign, "task": task}
    second = {
        "endpoint": endpoint,
        "endpoint_model": endpoint_model,
        "endpoint_prompt": endpoint_prompt,
    }
    given = {key: value for key, value in second.items() if value is not None}
    watch = _watch(files.path, prompts, sets, judge, given, settings)
    facts = run(
        files,
        rows,
        output,
        settings,
        targets_path=targets,
        tokens_path=safety_tokens,
        rehearsal_path=rehearsal,
        cache_place=cache,
        watch=watch,
    )
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(facts["metrics"]))
    else:
        shown = (f"{name} {value:.4g}" for name, value in facts["metrics"].items())
        click.echo(f"{output}: {', '.join(shown)}")


def _watch(
    model: Path,
    prompts: dict[str, str | None],
    sets: tuple[str, ...],
    judge: str,
    endpoint: dict[str, str],
    settings: FinetuneSettings,
) -> PromptWatch | None:
    if not settings.evaluate_steps:
        given = [f"--{name}" for name, source in prompts.items() if source]
        given += [f"--{key.replace('_', '-')}" for key in endpoint]
        given += [f"--set {text}" for text in sets]
        if given:
            raise SettingError(f"{given[0]}: expected --evaluate-steps above 0 too, found 0")
        return None
    from pact_offline.evaluation.prompt_sets import parse_set
    from pact_offline.evaluation.watch import watch_of

    further = [parse_set(text) for text in sets]
    return watch_of(model, prompts, further, judge, settings, endpoint)


@click.command()
@click.option("--model", type=MODEL, required=True, help="Model: path or NAME[@REVISION].")
@settings_options(LoraSettings)
@json_option
@adapter_option("model")
def modules(model: str, as_json: bool, settings: LoraSettings) -> None:
    """Show which modules would get a LoRA adapter.

    Loads no weights. A name that no module has is refused, with those that there are.

    Example: pact-offline modules --model A --lora-modules all-linear --lora-dropout 0
    """
    from pact_offline.models.load import empty_model
    from pact_offline.references import locate_reference
    from pact_offline.training.lora import adapted_modules, lora_targets

    policy = empty_model(str(locate_reference(model).path))
    found = adapted_modules(policy, lora_targets(policy, model, settings))
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, places in found.items():
        click.echo(f"{len(places):6}  {name:24} {places[0]}{' …' if places[1:] else ''}")


@click.command()
@click.option(
    "--model", type=MODEL, required=True, help="Model that was fine-tuned: path or NAME[@REVISION]."
)
@click.option(
    "--adapter",
    type=FOLDER,
    required=True,
    help="Directory of the adapter, from `pact-offline finetune`.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FOLDER,
    required=True,
    help="Directory of the merged model, to write.",
)
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
    from pact_offline.references import locate_reference
    from pact_offline.training.merge import merge as run

    run(locate_reference(model), adapter, output, dtype)
    click.echo(f"{output}: a model of its own")


@click.command()
@click.option(
    "--model", type=MODEL, required=True, help="Model that was fine-tuned: path or NAME[@REVISION]."
)
@click.option(
    "--base", type=MODEL, required=True, help="Its base model, before it was aligned; as --model."
)
@click.option(
    "--adapter",
    type=FOLDER,
    required=True,
    help="Directory of the LoRA adapter, from `pact-offline finetune`.",
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT_FOLDER,
    required=True,
    help="Directory of the projected adapter, to write.",
)
@settings_options(SafeLoraSettings)
@json_option
def safe_lora(
    model: str, base: str, adapter: Path, output: Path, as_json: bool, settings: SafeLoraSettings
) -> None:
    """Project a trained adapter onto what alignment has changed (Safe LoRA).

    Nothing is trained. Both models are held in memory.

    Example: pact-offline safe-lora --model A --base B --adapter adapter -o projected
    """
    from pact_offline.references import locate_reference
    from pact_offline.training.safe_lora import safe_lora as run

    facts = run(locate_reference(model), locate_reference(base), adapter, output, settings)
    found = facts["safe_lora"]
    if as_json:
        click.echo(json.dumps(found))
        return
    similar = found["similarity"].values()
    click.echo(
        f"{output}: {len(found['projected'])} of {len(similar)} modules projected, whose "
        f"similarity is {min(similar):.3f} to {max(similar):.3f}"
    )

"""What a run reads beside the model, and whether it belongs together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pact_offline.cache.refused import turns_of
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import InputError, SettingError
from pact_offline.models.locate import ModelFiles
from pact_offline.objectives.registry import objective_named, weights_in_use
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.positions import require_positions
from pact_offline.rows.tokenized import TokenizedRows, tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.rehearsal import Rehearsal
from pact_offline.training.uses import Uses, uses_of


class Paths(NamedTuple):
    """Where they are, as a user names them.

    Attributes:
        targets: targets.json of the rows.
        tokens: the safety tokens.
        rehearsal: targets.json of `pact-offline rehearse`.
        cache: the `cache` of `TargetCache.open`.
    """

    targets: Path | None
    tokens: Path | None
    rehearsal: Path | None
    cache: str | None


class Inputs(NamedTuple):
    """What was read: checked, and of one reference.

    Attributes:
        chat: template and tokenizer.
        rows: tokenized.
        tokens: the safety tokens; None where nothing reads them.
        cache: targets of the rows; None where nothing reads them.
        uses: what each answer is for; None: every one is learnt.
        rehearsal: rows that are mixed in and held, if any.
    """

    chat: Chat
    rows: TokenizedRows
    tokens: SafetyTokens | None
    cache: TargetCache | None
    uses: Uses | None
    rehearsal: Rehearsal | None


def require_what_settings_need(settings: FinetuneSettings, paths: Paths) -> None:
    """Refuse options that lack another, or do nothing beside it.

    Raises:
        SettingError: names both.
    """
    if settings.load_in is not None and settings.method == "full":
        raise SettingError(
            f"--load-in {settings.load_in}: expected --method lora, found full; weights in few "
            "bits are not trained"
        )
    is_plain, is_live = settings.objective == "none", settings.reference == "live"
    objective = objective_named(settings.objective)
    holds = objective is not None and not objective.replaces_cross_entropy
    if not holds and settings.refused_rows == "hold":
        raise SettingError(
            "--refused-rows hold: expected an objective that holds them, found --objective "
            f"{settings.objective}"
        )
    if not holds and paths.rehearsal is not None:
        raise SettingError(
            f"--objective {settings.objective}: expected no --rehearsal, found {paths.rehearsal}; "
            "only an objective beside the cross-entropy learns from it"
        )
    if objective is not None and objective.needs_vocabulary and not is_live:
        raise SettingError(
            f"--objective {settings.objective}: expected --reference live, found cache; a cache "
            "holds the safety tokens alone"
        )
    if is_live and paths.targets is not None:
        raise SettingError(f"--reference live: expected no --targets, found {paths.targets}")
    if is_live and (settings.refused_rows != "learn" or paths.rehearsal is not None):
        raise SettingError(
            "--reference live: expected --refused-rows learn and no --rehearsal, which are read "
            "from the cache"
        )
    needs_tokens = not is_plain or settings.refused_rows != "learn"
    name = f"--objective {settings.objective}"
    name = name if not is_plain else f"--refused-rows {settings.refused_rows}"
    if needs_tokens and paths.tokens is None:
        raise SettingError(
            f"{name}: expected --safety-tokens, found none; only --objective none trains without "
            "them"
        )
    if needs_tokens and not is_live and paths.targets is None:
        raise SettingError(
            f"{name}: expected --targets, found none; only --objective none and --reference live "
            "train without them"
        )


def read_inputs(
    model: ModelFiles, sources: Sequence[str | Path], settings: FinetuneSettings, paths: Paths
) -> Inputs:
    """Read what a run needs beside the model, and refuse what does not belong together.

    Raises:
        MissingFileError, InputError, StoreError, TargetsMismatchError: names the file.
    """
    chat = chat_of(str(model.path), settings)
    tokens = _load_safety_tokens(paths.tokens, chat, settings)
    cache = _open_cache(paths, settings)
    if cache is not None:
        cache.check_chat(chat.template_sha256, settings.chat_template_kwargs)
    rows = tokenized_rows(model, sources, settings, lambda: chat)
    require_positions(model, rows)
    uses = rehearsal = None
    if cache is not None and tokens is not None:
        cache.check_model(model)
        cache.check_safety_ids(tokens.ids, str(paths.tokens))
        cache.check_rows(rows, settings)
        if settings.refused_rows != "learn":
            uses = uses_of(turns_of(cache, tokens.weights), settings)
        if paths.rehearsal is not None and settings.rehearsal_share:
            rehearsal = Rehearsal.open(
                paths.rehearsal, model, chat, tokens, cache_place=paths.cache
            )
    per_batch = rows_per_batch(settings)
    left = len(rows) if uses is None else len(uses.kept_rows)
    if left < per_batch:
        raise InputError(
            f"{', '.join(map(str, sources))}: expected at least {per_batch} rows (--batch-size, of "
            f"every process), found {left}"
            + (f" without {len(rows) - left} refused ones" if left < len(rows) else "")
        )
    return Inputs(chat, rows, tokens, cache, uses, rehearsal)


def rows_per_batch(settings: FinetuneSettings) -> int:
    """Task rows of a batch, of every process."""
    return settings.batch_size * int(os.environ.get("WORLD_SIZE", "1"))


def _load_safety_tokens(
    path: Path | None, chat: Chat, settings: FinetuneSettings
) -> SafetyTokens | None:
    if path is None or (settings.objective == "none" and settings.refused_rows == "learn"):
        return None
    tokens = SafetyTokens.load(path, chat.tokenizer)
    tokens.check_template(chat.template_sha256, settings.chat_template_kwargs, path)
    weights_in_use(torch.from_numpy(tokens.weights), settings)
    return tokens


def _open_cache(paths: Paths, settings: FinetuneSettings) -> TargetCache | None:
    is_needed = settings.objective != "none" or settings.refused_rows != "learn"
    if paths.targets is None or not is_needed:
        return None
    return TargetCache.open(paths.targets, verify_all=True, cache=paths.cache)

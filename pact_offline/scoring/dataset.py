"""Scoring a dataset: known contexts are left alone, new ones are scored, all are bound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.cache.identity import IDENTITY_FILE, Identity, store_path
from pact_offline.cache.reader import Binding, Store
from pact_offline.cache.storage import open_storage
from pact_offline.cache.usage import record_usage
from pact_offline.cache.writer import StoreWriter
from pact_offline.config import ScoreSettings
from pact_offline.conversations import (
    Context,
    contexts_of,
    header_ids,
    load_tokenizer,
    read_rows,
    tokenize,
    tokenizer_fingerprint,
)
from pact_offline.errors import MissingTargetError
from pact_offline.hub import ModelFiles
from pact_offline.progress import bar
from pact_offline.provenance import provenance
from pact_offline.safety_tokens import SafetyTokens
from pact_offline.scoring.base import choose_backend, engine_name, make_scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A dataset's contexts, and the store they belong to.

    Attributes:
        contexts: distinct contexts by key.
        examples: both context keys of each row, in order, as in a `Binding`.
        sources: row files and their counts.
        tokenizer: fingerprint of the vocabulary.
        identity: of the store.
        store: its directory or URL.
        backend: "vllm" or "transformers".
        backend_reason: why that one.
    """

    contexts: dict[str, Context]
    examples: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]
    tokenizer: str
    identity: Identity
    store: str
    backend: str
    backend_reason: str


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring run did: counts of contexts, and of model tokens."""

    rows: int
    contexts: int
    shared: int
    known: int
    scored: int
    tokens: int
    backend: str
    store: str


def prepare(
    model: ModelFiles,
    sources: Sequence[str | Path],
    tokens_path: Path,
    cache: str | Path,
    settings: ScoreSettings,
) -> Dataset:
    """Tokenize the rows and name the store; loads no model."""
    tokenizer = load_tokenizer(str(model.path))
    safety_tokens = SafetyTokens.load(tokens_path, tokenizer)
    header = header_ids(tokenizer)
    backend, reason = choose_backend(settings.backend)
    identity = Identity(
        reference=model.identity,
        safety_ids=tuple(safety_tokens.ids),
        header_ids=tuple(header),
        engine=engine_name(backend),
        compute_dtype=settings.dtype,
        stored_dtype=settings.stored_dtype,
    )
    contexts: dict[str, Context] = {}
    examples, counted = [], []
    for source in sources:
        rows = read_rows(source)
        counted.append({"source": str(source), "rows": len(rows)})
        for example in tokenize(rows, tokenizer, settings.max_tokens):
            pair = contexts_of(example, header)
            keys = (pair[0].key, pair[1].key)
            contexts.update(zip(keys, pair, strict=True))
            examples.append("".join(keys))
    return Dataset(
        contexts,
        tuple(examples),
        tuple(counted),
        tokenizer_fingerprint(tokenizer),
        identity,
        store_path(cache, model.name, identity),
        backend,
        reason,
    )


def fill(
    dataset: Dataset, model: ModelFiles, settings: ScoreSettings, part: tuple[int, int] = (1, 1)
) -> ScoreSummary:
    """Score the contexts that the store does not hold yet.

    Args:
        dataset: from `prepare`.
        model: the reference model.
        settings: dtype, batch and memory.
        part: (i, n) scores the i-th of n parts, split by context key.
    """
    known: set[str] = set()
    if open_storage(dataset.store).has(IDENTITY_FILE):
        keys = list(dataset.contexts)
        places = Store(dataset.store).locate(keys)
        known = {key for key, place in zip(keys, places, strict=True) if place >= 0}
    index, count = part
    missing = [
        context
        for key, context in dataset.contexts.items()
        if key not in known and int(key, 16) % count == index - 1
    ]
    summary = ScoreSummary(
        rows=len(dataset.examples),
        contexts=2 * len(dataset.examples),
        shared=2 * len(dataset.examples) - len(dataset.contexts),
        known=len(known),
        scored=len(missing),
        tokens=sum(len(context.ids) for context in missing),
        backend=dataset.backend,
        store=dataset.store,
    )
    log.info(
        "%d rows: %d contexts, %d shared, %d known, %d to score",
        summary.rows, summary.contexts, summary.shared, summary.known, summary.scored,
    )  # fmt: skip
    if not missing:
        return summary
    log.info("backend: %s (%s)", dataset.backend, dataset.backend_reason)
    scorer = make_scorer(
        dataset.backend,
        model.path,
        dataset.identity.safety_ids,
        max(len(context.ids) for context in missing),
        settings,
    )
    facts = provenance(
        model=model.name,
        backend=dataset.backend,
        backend_reason=dataset.backend_reason,
        part=f"{index}/{count}",
    )
    with (
        StoreWriter(dataset.store, dataset.identity, settings.shard_steps, facts) as writer,
        bar("scoring", summary.tokens, "tokens") as progress,
    ):
        for scored in scorer.score(missing):
            context = missing[scored.position]
            writer.add(context, scored.log_confidences)
            progress.update(len(context.ids))
    return summary


def bind(dataset: Dataset, model: ModelFiles, settings: ScoreSettings, path: Path) -> Binding:
    """Write targets.json for a dataset whose contexts are all in the store.

    Raises:
        MissingTargetError: some are not.
    """
    store = Store(dataset.store)
    places = store.locate(list(dataset.contexts))
    if missing := int((places < 0).sum()):
        raise MissingTargetError(
            f"{dataset.store}: expected {len(places)} contexts, found {len(places) - missing}; "
            "run `pact-offline score` again to fill the gap"
        )
    binding = Binding(
        store=dataset.store,
        identity=dataset.identity,
        tokenizer=dataset.tokenizer,
        max_tokens=settings.max_tokens,
        examples=dataset.examples,
        shards=tuple(store.shards_of(places)),
        rows=dataset.sources,
        provenance=provenance(
            model=model.name, backend=dataset.backend, backend_reason=dataset.backend_reason
        ),
    )
    binding.save(path)
    record_usage(dataset.store, binding, path)
    return binding

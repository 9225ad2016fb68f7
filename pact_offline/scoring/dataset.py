"""Scoring a dataset: known contexts are left alone, new ones are scored, all are bound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pact_offline.cache.identity import IDENTITY_FILE, Identity, store_path
from pact_offline.cache.reader import Binding, Store
from pact_offline.cache.shard import SHARDS, SIDECAR
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
from pact_offline.scoring.base import bind_device, choose_backend, engine_name, make_scorer
from pact_offline.scoring.recall import Recalled, recall, remember

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A dataset's contexts, and the store they belong to.

    Attributes:
        contexts: distinct contexts by key; none where the store knows them all.
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

    @cached_property
    def keys(self) -> list[str]:
        """Distinct context keys, in order."""
        return list(dict.fromkeys(k for pair in self.examples for k in (pair[:32], pair[32:])))


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
    """Name a dataset's contexts and the store they belong to; loads no model.

    Rows that were tokenized before are not tokenized again where the store knows all of them.
    """
    recalled = [recall(model, source, settings.max_tokens) for source in sources]
    if all(recalled):
        safety_tokens = SafetyTokens.load(tokens_path)
        dataset = _assemble(
            model, sources, [r for r in recalled if r], {}, safety_tokens, cache, settings
        )
        is_right = dataset.tokenizer == safety_tokens.tokenizer
        if is_right and known_keys(dataset) == set(dataset.keys):
            return dataset
    tokenizer = load_tokenizer(str(model.path))
    safety_tokens = SafetyTokens.load(tokens_path, tokenizer)
    header, fingerprint = header_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    contexts: dict[str, Context] = {}
    found = []
    for source in sources:
        examples = []
        for example in tokenize(read_rows(source), tokenizer, settings.max_tokens):
            pair = {context.key: context for context in contexts_of(example, header)}
            contexts.update(pair)
            examples.append("".join(pair))
        found.append(Recalled(fingerprint, tuple(header), tuple(examples)))
        remember(model, source, settings.max_tokens, found[-1])
    return _assemble(model, sources, found, contexts, safety_tokens, cache, settings)


def _assemble(
    model: ModelFiles,
    sources: Sequence[str | Path],
    parts: Sequence[Recalled],
    contexts: dict[str, Context],
    safety_tokens: SafetyTokens,
    cache: str | Path,
    settings: ScoreSettings,
) -> Dataset:
    backend, reason = choose_backend(settings.backend)
    identity = Identity(
        reference=model.identity,
        safety_ids=tuple(safety_tokens.ids),
        header_ids=parts[0].header_ids,
        engine=engine_name(backend),
        compute_dtype=settings.dtype,
        stored_dtype=settings.stored_dtype,
    )
    counts = zip(sources, parts, strict=True)
    return Dataset(
        contexts=contexts,
        examples=tuple(keys for part in parts for keys in part.examples),
        sources=tuple({"source": str(s), "rows": len(p.examples)} for s, p in counts),
        tokenizer=parts[0].tokenizer,
        identity=identity,
        store=store_path(cache, model.name, identity),
        backend=backend,
        backend_reason=reason,
    )


def known_keys(dataset: Dataset) -> set[str]:
    """Those of a dataset's context keys that the store holds."""
    if not open_storage(dataset.store).has(IDENTITY_FILE):
        return set()
    places = Store(dataset.store).locate(dataset.keys)
    return {key for key, place in zip(dataset.keys, places, strict=True) if place >= 0}


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
    known = known_keys(dataset)
    index, count = part
    wanted = [k for k in dataset.keys if k not in known and int(k, 16) % count == index - 1]
    if wanted and not dataset.contexts:
        raise MissingTargetError(
            f"{dataset.store}: a shard was removed meanwhile; run `pact-offline score` again"
        )
    missing = [dataset.contexts[key] for key in wanted]
    summary = ScoreSummary(
        rows=len(dataset.examples),
        contexts=2 * len(dataset.examples),
        shared=2 * len(dataset.examples) - len(dataset.keys),
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
    if device := bind_device(part, settings.tensor_parallel_size):
        log.info("part %d of %d: on GPU %s", index, count, device)
    scorer = make_scorer(
        dataset.backend,
        model.path,
        dataset.identity.safety_ids,
        max(len(context.ids) for context in missing),
        settings,
    )
    log.info("log-confidences by %s", scorer.how)
    facts = provenance(
        model=model.name,
        backend=dataset.backend,
        backend_reason=dataset.backend_reason,
        how=scorer.how,
        part=f"{index}/{count}",
    )
    with (
        closing(scorer),
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
    places = store.locate(dataset.keys)
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
    record_usage(dataset.store, binding, path)  # first, so that no gc takes what is bound
    storage = open_storage(dataset.store)
    if not all(storage.has(f"{SHARDS}/{shard}/{SIDECAR}") for shard in binding.shards):
        raise MissingTargetError(
            f"{dataset.store}: a shard was removed meanwhile; run `pact-offline score` again"
        )
    binding.save(path)
    return binding

"""A dataset's contexts, and the store that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pact_offline.cache.format import join_pair, split_pair
from pact_offline.cache.identity import IDENTITY_FILE, Identity, store_path
from pact_offline.cache.storage import open_storage
from pact_offline.cache.store import Store
from pact_offline.models.locate import ModelFiles
from pact_offline.rows.chat import header_ids, load_tokenizer, tokenize, tokenizer_fingerprint
from pact_offline.rows.contexts import Context, contexts_of
from pact_offline.rows.read import read_rows
from pact_offline.rows.tokenized_before import Recalled, recall, remember
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.scoring.backends import choose_backend, engine_name
from pact_offline.settings.stages import ScoreSettings


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
        return list(dict.fromkeys(key for pair in self.examples for key in split_pair(pair)))


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
        if is_right and knows_all(dataset):
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
            examples.append(join_pair(*pair))
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
    dataset = Dataset(
        contexts=contexts,
        examples=tuple(keys for part in parts for keys in part.examples),
        sources=tuple({"source": str(s), "rows": len(p.examples)} for s, p in counts),
        tokenizer=parts[0].tokenizer,
        identity=identity,
        store=store_path(cache, model.name, identity),
        backend=backend,
        backend_reason=reason,
    )
    if settings.backend == "auto" and backend == "vllm":
        other = on_transformers(dataset, model, cache, "its store knows every context")
        if knows_all(other) and not knows_all(dataset):
            return other
    return dataset


def on_transformers(
    dataset: Dataset, model: ModelFiles, cache: str | Path, reason: str
) -> Dataset:
    """The same contexts, and the store of what transformers computes for them."""
    identity = replace(dataset.identity, engine=engine_name("transformers"))
    store = store_path(cache, model.name, identity)
    return replace(
        dataset, identity=identity, store=store, backend="transformers", backend_reason=reason
    )


def knows_all(dataset: Dataset) -> bool:
    """Whether the store holds every context of a dataset."""
    return known_keys(dataset) == set(dataset.keys)


def known_keys(dataset: Dataset) -> set[str]:
    """Those of a dataset's context keys that the store holds."""
    if not open_storage(dataset.store).has(IDENTITY_FILE):
        return set()
    places = Store(dataset.store).locate(dataset.keys)
    return {key for key, place in zip(dataset.keys, places, strict=True) if place >= 0}

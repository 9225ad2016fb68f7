"""A dataset's contexts, and the store that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pact_offline.cache.format import join_pair, split_pair
from pact_offline.cache.identity import Identity, store_path
from pact_offline.errors import InputError
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
        examples: both context keys of each row, in order, as in a `Binding`.
        sources: row files and their counts.
        tokenizer: fingerprint of the vocabulary.
        identity: of the store.
        store: its directory or URL.
        backend: "vllm" or "transformers".
        backend_reason: why that one.
        read_contexts: gives `contexts`.
    """

    examples: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]
    tokenizer: str
    identity: Identity
    store: str
    backend: str
    backend_reason: str
    read_contexts: Callable[[], dict[str, Context]]

    @cached_property
    def keys(self) -> list[str]:
        """Distinct context keys, in order."""
        return list(dict.fromkeys(key for pair in self.examples for key in split_pair(pair)))

    @cached_property
    def contexts(self) -> dict[str, Context]:
        """Distinct contexts by key; tokenizes the rows if only their keys were remembered.

        Raises:
            InputError: the rows are others than when the dataset was named.
        """
        contexts = self.read_contexts()
        if not contexts.keys() >= set(self.keys):
            names = ", ".join(source["source"] for source in self.sources)
            raise InputError(f"{names}: changed while it was read; run the same command again")
        return contexts


class _Tokenized(NamedTuple):
    """Each source's keys, and the contexts of all."""

    parts: list[Recalled]
    contexts: dict[str, Context]


def prepare(
    model: ModelFiles,
    sources: Sequence[str | Path],
    tokens_path: Path,
    cache: str | Path,
    settings: ScoreSettings,
) -> Dataset:
    """Name a dataset's contexts and the store they belong to; loads no model.

    Rows that were tokenized before are tokenized again only when their contexts are asked for.
    """
    safety_tokens = SafetyTokens.load(tokens_path)
    parts = [part for source in sources if (part := recall(model, source, settings.max_tokens))]
    if len(parts) == len(sources) and {part.tokenizer for part in parts} == {
        safety_tokens.tokenizer
    }:

        def read_contexts() -> dict[str, Context]:
            return _tokenize(model, sources, load_tokenizer(str(model.path)), settings).contexts

    else:
        tokenizer = load_tokenizer(str(model.path))
        safety_tokens = SafetyTokens.load(tokens_path, tokenizer)
        parts, contexts = _tokenize(model, sources, tokenizer, settings)

        def read_contexts() -> dict[str, Context]:
            return contexts

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
        examples=tuple(keys for part in parts for keys in part.examples),
        sources=tuple({"source": str(s), "rows": len(p.examples)} for s, p in counts),
        tokenizer=parts[0].tokenizer,
        identity=identity,
        store=store_path(cache, model.name, identity),
        backend=backend,
        backend_reason=reason,
        read_contexts=read_contexts,
    )


def on_transformers(dataset: Dataset, model: ModelFiles, cache: str | Path, reason: str) -> Dataset:
    """The same contexts, and the store of what transformers computes for them."""
    identity = replace(dataset.identity, engine=engine_name("transformers"))
    return replace(
        dataset,
        identity=identity,
        store=store_path(cache, model.name, identity),
        backend="transformers",
        backend_reason=reason,
    )


def _tokenize(
    model: ModelFiles, sources: Sequence[str | Path], tokenizer: Any, settings: ScoreSettings
) -> _Tokenized:
    header, fingerprint = header_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    contexts: dict[str, Context] = {}
    parts = []
    for source in sources:
        examples = []
        for example in tokenize(read_rows(source), tokenizer, settings.max_tokens):
            pair = {context.key: context for context in contexts_of(example, header)}
            contexts.update(pair)
            examples.append(join_pair(*pair))
        parts.append(Recalled(fingerprint, tuple(header), tuple(examples)))
        remember(model, source, settings.max_tokens, parts[-1])
    return _Tokenized(parts, contexts)

"""A dataset's contexts, and the store that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pact_offline.arrow import numbers
from pact_offline.cache.identity import Identity, compute_name, store_path
from pact_offline.cache.row_keys import RowKeys
from pact_offline.cache.targets import keys_of
from pact_offline.models.backends import choose_backend, engine_name
from pact_offline.models.locate import ModelFiles
from pact_offline.rows.chat import chat_of
from pact_offline.rows.contexts import Context, full_context, response_only_context
from pact_offline.rows.positions import require_positions
from pact_offline.rows.tokenized import TokenizedRows, tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.settings.stages import ScoreSettings


@dataclass(frozen=True)
class Dataset:
    """A dataset's contexts, and the store they belong to.

    A context is named by its place among the keys of all rows.

    Attributes:
        rows: tokenized.
        identity: of the store.
        store: its directory or URL.
        backend: "vllm" or "transformers".
        backend_reason: why that one.
    """

    rows: TokenizedRows
    identity: Identity
    store: str
    backend: str
    backend_reason: str

    @cached_property
    def keys(self) -> RowKeys:
        return keys_of(self.rows)

    @cached_property
    def distinct(self) -> np.ndarray:
        """Places of the distinct contexts, int64, in order."""
        keys = self.rows.keys
        return numbers(pc.index_in(keys.unique(), value_set=keys)).astype(np.int64)

    @cached_property
    def distinct_keys(self) -> pa.FixedSizeBinaryArray:
        """Their keys, in the same order."""
        return self.rows.keys.unique()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each context, int64, by its place."""
        lengths = np.zeros(len(self.rows.keys), np.int64)
        is_full = np.zeros(len(lengths), bool)
        is_full[self.keys.starts] = True
        lengths[is_full] = self.rows.lengths
        lengths[~is_full] = len(self.identity.header_ids) + self.rows.answer_lengths
        return lengths

    def context(self, place: int) -> Context:
        """The context at a place."""
        row = int(np.searchsorted(self.keys.ends, place, side="right"))
        turn = place - int(self.keys.starts[row]) - 1
        if turn < 0:
            return full_context(self.rows[row])
        return response_only_context(self.rows[row], self.identity.header_ids, turn)

    def contexts(self, places: Sequence[int] | np.ndarray) -> list[Context]:
        """The contexts at some places."""
        return [self.context(int(place)) for place in places]


def prepare(
    model: ModelFiles,
    sources: Sequence[str | Path],
    tokens_path: Path,
    cache_place: str | Path,
    settings: ScoreSettings,
) -> Dataset:
    """Name a dataset's contexts and the store they belong to; loads no model.

    Rows that were tokenized before are not tokenized again.

    Raises:
        InputError: rows that cannot be used, or one that is longer than the model's positions.
    """
    safety_tokens = SafetyTokens.load(tokens_path)
    rows = tokenized_rows(
        model, sources, settings, cache(lambda: chat_of(str(model.path), settings))
    )
    if safety_tokens.tokenizer != rows.facts[0].tokenizer:
        SafetyTokens.load(tokens_path, chat_of(str(model.path), settings).tokenizer)
    safety_tokens.check_template(rows.facts[0].template, settings.chat_template_kwargs, tokens_path)
    require_positions(model, rows)
    backend, reason = choose_backend(settings.backend, settings.load_in)
    identity = Identity(
        reference=model.identity,
        safety_ids=tuple(safety_tokens.ids),
        header_ids=tuple(rows.facts[0].header_ids),
        engine=engine_name(backend),
        compute_dtype=compute_name(settings.dtype, settings.load_in),
        stored_dtype=settings.stored_dtype,
    )
    return Dataset(
        rows=rows,
        identity=identity,
        store=store_path(cache_place, model.name, identity),
        backend=backend,
        backend_reason=reason,
    )


def on_transformers(
    dataset: Dataset, model: ModelFiles, cache_place: str | Path, reason: str
) -> Dataset:
    """The same contexts, and the store of what transformers computes for them."""
    identity = replace(dataset.identity, engine=engine_name("transformers"))
    return replace(
        dataset,
        identity=identity,
        store=store_path(cache_place, model.name, identity),
        backend="transformers",
        backend_reason=reason,
    )

"""Binding a dataset to the store that knows it."""

from __future__ import annotations

from pathlib import Path

from pact_offline.cache.bindings import record_usage
from pact_offline.cache.format import is_committed
from pact_offline.cache.storage import open_storage
from pact_offline.cache.store import Store
from pact_offline.cache.targets import Binding
from pact_offline.errors import MissingTargetError
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import provenance
from pact_offline.scoring.dataset import Dataset
from pact_offline.settings.stages import ScoreSettings


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
    if not all(is_committed(storage, shard) for shard in binding.shards):
        raise MissingTargetError(
            f"{dataset.store}: a shard was removed meanwhile; run `pact-offline score` again"
        )
    binding.save(path)
    return binding

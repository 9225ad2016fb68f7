"""Binding a dataset to the store that knows it."""

from __future__ import annotations

from pathlib import Path

from pact_offline.cache.bindings import save_binding
from pact_offline.cache.targets import Binding
from pact_offline.errors import MissingTargetError
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import provenance
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings


def bind(job: ScoringJob, model: ModelFiles, settings: ScoreSettings, path: Path) -> Binding:
    """Write targets.json for a dataset whose contexts are all in the store.

    Args:
        job: entered, and filled.
        model: the reference model.
        settings: how rows were cut.
        path: where to write it.

    Raises:
        MissingTargetError: some contexts are not there, or no longer. Nothing is written.
    """
    dataset, store = job.dataset, job.store
    missing = len(job.missing())
    if store is None or missing:
        raise MissingTargetError(
            f"{dataset.store}: expected {len(dataset.keys)} contexts, found "
            f"{len(dataset.keys) - missing}; run `pact-offline score` again to fill the gap"
        )
    binding = Binding(
        store=dataset.store,
        identity=dataset.identity,
        tokenizer=dataset.tokenizer,
        max_tokens=settings.max_tokens,
        examples=dataset.examples,
        shards=tuple(sorted(store.shards_of(store.locate(dataset.keys)))),
        rows=dataset.sources,
        provenance=provenance(
            model=model.name, backend=dataset.backend, backend_reason=dataset.backend_reason
        ),
    )
    save_binding(dataset.store, binding, path)
    job.lease.end_parts()
    return binding

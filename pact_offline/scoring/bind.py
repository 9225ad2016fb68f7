"""Binding a dataset to the store that knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pact_offline.cache.bindings import save_binding
from pact_offline.cache.targets import Binding, row_settings
from pact_offline.errors import MissingTargetError
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import provenance
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings


def bind(
    job: ScoringJob,
    model: ModelFiles,
    settings: ScoreSettings,
    path: Path,
    made_from: dict[str, Any] | None = None,
) -> Binding:
    """Write targets.json for a dataset whose contexts are all in the store.

    Args:
        job: entered, and filled.
        model: the reference model.
        settings: how rows became tokens.
        path: where to write it.
        made_from: more of its provenance.

    Raises:
        MissingTargetError: some contexts are not there, or no longer. Nothing is written.
    """
    dataset, store = job.dataset, job.store
    facts = dataset.rows.facts
    missing = len(job.missing())
    if store is None or missing:
        raise MissingTargetError(
            f"{dataset.store}: expected {len(dataset.distinct)} contexts, found "
            f"{len(dataset.distinct) - missing}; run `pact-offline score` again to fill the gap"
        )
    binding = Binding(
        store=dataset.store,
        identity=dataset.identity,
        tokenizer=facts[0].tokenizer,
        template=facts[0].template,
        settings=row_settings(settings),
        keys=dataset.keys,
        shards=tuple(sorted(store.shards_of(store.find(dataset.distinct_keys)))),
        rows=tuple(
            {
                "source": one.source,
                "sha256": one.sha256,
                "rows": len(table),
                "read": one.read,
                "bad": one.bad,
                "long": one.long,
            }
            for one, table in zip(facts, dataset.rows.tables, strict=True)
        ),
        provenance=provenance(
            model=model.name,
            backend=dataset.backend,
            backend_reason=dataset.backend_reason,
            **(made_from or {}),
        ),
    )
    save_binding(dataset.store, binding, path)
    job.lease.end_parts()
    return binding

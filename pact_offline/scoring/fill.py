"""Scoring what a store does not know yet."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass

from pact_offline.cache.writer import StoreWriter
from pact_offline.models.locate import ModelFiles
from pact_offline.progress import bar
from pact_offline.provenance import provenance
from pact_offline.scoring.backends import bind_device, make_scorer
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings

log = logging.getLogger(__name__)


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


def fill(job: ScoringJob, model: ModelFiles, settings: ScoreSettings) -> ScoreSummary:
    """Score the contexts that the store does not hold yet, or this part of them.

    Args:
        job: entered.
        model: the reference model.
        settings: dtype, batch and memory.

    Raises:
        UnsupportedModelError: vLLM refuses the model; there is no new store then.
        ModelError: the model cannot be loaded, or its files changed meanwhile.
    """
    dataset, (index, count) = job.dataset, job.part
    unknown = job.missing()
    wanted = [key for key in unknown if int(key, 16) % count == index - 1]
    missing = [dataset.contexts[key] for key in wanted]
    summary = ScoreSummary(
        rows=len(dataset.examples),
        contexts=2 * len(dataset.examples),
        shared=2 * len(dataset.examples) - len(dataset.keys),
        known=len(dataset.keys) - len(unknown),
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
    if device := bind_device(job.part, settings.tensor_parallel_size):
        log.info("part %d of %d: on GPU %s", index, count, device)
    scorer = make_scorer(
        dataset.backend,
        model.path,
        dataset.identity.safety_ids,
        max(len(context.ids) for context in missing),
        settings,
    )
    with closing(scorer):
        log.info("log-confidences by %s", scorer.how)
        model.require_unchanged()  # now that the weights are read, and before any value is kept
        facts = provenance(
            model=model.name,
            backend=dataset.backend,
            backend_reason=dataset.backend_reason,
            how=scorer.how,
            part=f"{index}/{count}",
        )
        with (
            StoreWriter(dataset.store, dataset.identity, settings.shard_steps, facts) as writer,
            bar("scoring", summary.tokens, "tokens") as progress,
        ):
            job.lease.take()  # of a store that was not there until now
            for scored in scorer.score(missing):
                context = missing[scored.position]
                writer.add(context, scored.log_confidences)
                progress.update(len(context.ids))
    model.require_unchanged()  # what is written over shows through where weights are mapped
    job.add(writer.shards)
    return summary

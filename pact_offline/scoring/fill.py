"""Scoring what a store does not know yet."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass

from pact_offline.cache.format import strays
from pact_offline.cache.storage import open_storage
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import MissingTargetError
from pact_offline.models.locate import ModelFiles
from pact_offline.progress import bar
from pact_offline.provenance import provenance
from pact_offline.scoring.backends import bind_device, make_scorer
from pact_offline.scoring.dataset import Dataset, known_keys
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
    for line in strays(open_storage(dataset.store)):
        log.warning(line)
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

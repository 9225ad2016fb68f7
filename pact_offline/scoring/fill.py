"""Scoring what a store does not know yet."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pact_offline.cache.writer import StoreWriter
from pact_offline.models.locate import ModelFiles
from pact_offline.progress import bar
from pact_offline.provenance import provenance
from pact_offline.rows.contexts import KEY_BYTES
from pact_offline.scoring.backends import bind_device, make_scorer
from pact_offline.scoring.job import ScoringJob
from pact_offline.settings.stages import ScoreSettings

log = logging.getLogger(__name__)

_AT_ONCE = 1 << 16  # contexts in memory, sorted by length among each other


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
    wanted = unknown[_part_of(dataset.distinct_keys, count)[unknown] == index - 1]
    places = dataset.distinct[wanted]
    summary = ScoreSummary(
        rows=len(dataset.rows),
        contexts=len(dataset.rows.keys),
        shared=len(dataset.rows.keys) - len(dataset.distinct),
        known=len(dataset.distinct) - len(unknown),
        scored=len(places),
        tokens=int((dataset.lengths[places] - 1).sum()),  # the last of each is not fed
        backend=dataset.backend,
        store=dataset.store,
    )
    log.info(
        "%d rows: %d contexts, %d shared, %d known, %d to score",
        summary.rows, summary.contexts, summary.shared, summary.known, summary.scored,
    )  # fmt: skip
    if not len(places):
        return summary
    log.info("backend: %s (%s)", dataset.backend, dataset.backend_reason)
    if device := bind_device(job.part, settings.tensor_parallel_size):
        log.info("part %d of %d: on GPU %s", index, count, device)
    scorer = make_scorer(
        dataset.backend,
        model.path,
        dataset.identity.safety_ids,
        int(dataset.lengths.max()),
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
            for first in range(0, len(places), _AT_ONCE):
                contexts = dataset.contexts(places[first : first + _AT_ONCE])
                for scored in scorer.score(contexts):
                    context = contexts[scored.position]
                    writer.add(context, scored.log_confidences, scored.labels)
                    progress.update(len(context.fed))
    model.require_unchanged()  # what is written over shows through where weights are mapped
    job.add(writer.shards)
    return summary


def _part_of(keys: pa.FixedSizeBinaryArray, count: int) -> np.ndarray:
    """Which of `count` parts, from 0, each key belongs to, whoever asks; int64 [keys]."""
    data = keys.buffers()[1]
    starts = np.frombuffer(data, ">u8", 2 * len(keys), keys.offset * KEY_BYTES)[::2]
    return (starts % np.uint64(count)).astype(np.int64)

"""How many rows are prepared a second, and in how much memory, for any count of rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pact_offline.errors import InputError
from pact_offline.machine import peak_resident_mib
from pact_offline.models.locate import locate_model
from pact_offline.progress import bar
from pact_offline.rows.read import read_rows
from pact_offline.settings.stages import FinetuneSettings, ScoreSettings

_BASE_ROWS = 64


@dataclass(frozen=True)
class RowsSpeed:
    """What a count of rows takes, each measured in a process of its own.

    Attributes:
        rows: how many.
        tokens: of a row, in the mean.
        prepare_rows_per_second: `score`, from rows to the contexts that are to be scored.
        prepare_mib: peak resident memory of that process.
        known_seconds: the same once more, of rows that were tokenized before and are in the store.
        start_seconds: `finetune` from the cache with one step, beyond what 64 rows take.
        start_mib: its peak resident memory, beyond what 64 rows take.
    """

    rows: int
    tokens: float
    prepare_rows_per_second: float
    prepare_mib: float
    known_seconds: float
    start_seconds: float
    start_mib: float


class _Measured(NamedTuple):
    seconds: float
    mib: float
    found: Any


def measure_rows(
    model: str, source: str, tokens_path: Path, counts: Sequence[int], settings: FinetuneSettings
) -> list[RowsSpeed]:
    """Repeat rows with a number in front, and time what is done with them before any model runs.

    Their store is filled with random values: it is read, and nothing is learnt of it.

    Args:
        model: hub id or path.
        source: row file, of which only prompt and response are taken.
        tokens_path: safety_tokens.json.
        counts: of rows.
        settings: of the fine-tuning step.
    """
    texts = [(row.question, row.response) for row in read_rows(source)]
    if not all(response for _, response in texts):
        raise InputError(f"{source}: expected rows that end with an answer, found others")
    found, base = [], None
    with bar("measuring", 1 + len(counts), "counts") as progress:
        for count in (_BASE_ROWS, *counts):
            with tempfile.TemporaryDirectory() as scratch:
                one = _measure(model, texts, tokens_path, count, settings, Path(scratch))
            progress.update(1)
            if base is None:
                base = one
                continue
            prepared, known, started, tokens = one
            found.append(
                RowsSpeed(
                    count,
                    tokens,
                    count / prepared.seconds,
                    prepared.mib,
                    known.seconds,
                    started.seconds - base[2].seconds,
                    started.mib - base[2].mib,
                )
            )
    return found


def _measure(
    model: str,
    texts: Sequence[tuple[str, str | None]],
    tokens_path: Path,
    count: int,
    settings: FinetuneSettings,
    scratch: Path,
) -> tuple[_Measured, _Measured, _Measured, float]:
    rows = scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt, response = texts[number % len(texts)]
            row = {"prompt": f"{number} {prompt}", "response": response}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    given = (model, rows, tokens_path, scratch)
    prepared = _alone(_prepare, *given)
    _alone(_fill_and_bind, *given)
    known = _alone(_prepare, *given)
    if known.found[1]:
        raise InputError(f"expected every context in the store, found {known.found[1]} missing")
    started = _alone(_finetune, *given, settings)
    return prepared, known, started, prepared.found[0]


def _alone(work: Callable[..., Any], *given: Any) -> _Measured:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(_timed, work, given).result()


def _timed(work: Callable[..., Any], given: tuple[Any, ...]) -> _Measured:
    os.environ["HF_DATASETS_CACHE"] = str(given[3] / "tokenized")
    load_first = work.__name__ in ("_prepare", "_finetune")
    if load_first:
        import transformers  # noqa: F401 - its seconds are not those of rows
    started = time.perf_counter()
    found = work(*given)
    return _Measured(time.perf_counter() - started, peak_resident_mib(), found)


def _prepare(model: str, rows: Path, tokens_path: Path, scratch: Path) -> tuple[float, int]:
    from pact_offline.scoring.dataset import prepare
    from pact_offline.scoring.job import ScoringJob

    files = locate_model(model)
    dataset = prepare(files, [rows], tokens_path, scratch / "cache", _SCORING)
    with ScoringJob(dataset) as job:
        missing = len(job.missing())
    return float(dataset.rows.lengths.mean()), missing


_SCORING = ScoreSettings(backend="transformers", dtype="float32")


def _fill_and_bind(model: str, rows: Path, tokens_path: Path, scratch: Path) -> None:
    from pact_offline.cache.writer import StoreWriter
    from pact_offline.scoring.bind import bind
    from pact_offline.scoring.dataset import prepare
    from pact_offline.scoring.job import ScoringJob

    files = locate_model(model)
    dataset = prepare(files, [rows], tokens_path, scratch / "cache", _SCORING)
    ids, random = len(dataset.identity.safety_ids), np.random.default_rng(0)
    values = -20 * random.random((_SCORING.max_tokens, ids), dtype=np.float32)
    with ScoringJob(dataset) as job:
        with StoreWriter(dataset.store, dataset.identity, _SCORING.shard_steps, {}) as writer:
            places = iter(dataset.distinct)
            while some := [*islice(places, 4096)]:
                for context in dataset.contexts(some):
                    steps = context.steps
                    writer.add(context, values[:steps], values[:steps, 0])
        job.lease.take()
        job.add(writer.shards)
        bind(job, files, _SCORING, scratch / "targets.json")


def _finetune(
    model: str, rows: Path, tokens_path: Path, scratch: Path, settings: FinetuneSettings
) -> None:
    from pact_offline.training.finetune import finetune

    files = locate_model(model)
    with rows.open(encoding="utf-8") as file:
        count = sum(1 for _ in file)
    one_step = settings.model_copy(update={"epochs": settings.batch_size / count})
    finetune(
        files,
        [rows],
        scratch / "adapter",
        one_step,
        targets_path=scratch / "targets.json",
        tokens_path=tokens_path,
    )


def rows_table(found: Sequence[RowsSpeed]) -> str:
    """Markdown rows of the measurements."""
    lines = [
        "| rows | tokens a row | prepared, rows/s | peak memory | a row | known again "
        "| `finetune` starts later by | with more memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.rows:,} | {one.tokens:.0f} | {one.prepare_rows_per_second:,.0f} "
        f"| {one.prepare_mib:,.0f} MiB | {one.prepare_mib * 2**20 / one.rows:,.0f} B "
        f"| {one.known_seconds:.1f} s | {one.start_seconds:.1f} s | {one.start_mib:,.0f} MiB |"
        for one in found
    ]
    return "\n".join(lines)

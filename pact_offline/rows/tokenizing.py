"""Tokenizing a source into an Arrow file, on every core."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pact_offline.arrow import array_of, lists_of
from pact_offline.errors import InputError
from pact_offline.machine import usable_cores
from pact_offline.progress import bar
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import KEY_BYTES, TokenizedExample, key_bytes_of
from pact_offline.rows.files import Value, checksum_of, values_of
from pact_offline.rows.read import NAMED, Findings, row_of
from pact_offline.rows.row import Row
from pact_offline.rows.spans import Turn
from pact_offline.rows.tokenize import LongRowError, tokenize
from pact_offline.settings.stages import RowSettings

SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("turns", pa.large_list(pa.int32())),  # header, start, first and end of each turn
        ("keys", pa.large_binary()),  # of the full context, then of each response-only one
        ("place", pa.int64()),
        ("is_cut", pa.uint8()),
    ]
)
_AT_ONCE = 512  # rows of a chunk
_ALONE = 8  # chunks before other processes are started
_BATCHES_KEPT = 16
_LOOKS_EVERY = 1.0


@dataclass
class Facts:
    """What reading and tokenizing a source found.

    Attributes:
        source: as it was given.
        tokenizer: fingerprint of the vocabulary.
        template: SHA-256 over the chat template.
        header_ids: assistant header of the response-only contexts.
        sha256: of the source's file, 64 hex digits; None for the hub.
        read: rows in the source.
        bad: rows that cannot be used, and are left out.
        long: rows with no response within the most tokens of a row, left out.
        problems: what is wrong with the first of both.
        unread: rows with a key that nothing reads, by key.
    """

    source: str
    tokenizer: str
    template: str
    header_ids: list[int]
    sha256: str | None = None
    read: int = 0
    bad: int = 0
    long: int = 0
    problems: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)


class _Chunk(NamedTuple):
    """What tokenizing some values gave.

    Attributes:
        batch: record batch of the rows that are trained.
        read: how many values there were.
        bad, long: what is wrong with each that cannot be used, or has no response left.
        unread: rows with a key that nothing reads, by key.
    """

    batch: pa.RecordBatch
    read: int
    bad: list[str]
    long: list[str]
    unread: Counter[str]


@dataclass(frozen=True)
class _Work:
    """Tokenizes chunks of one source."""

    source: str
    settings: RowSettings
    chat: Chat

    def __call__(self, values: Sequence[Value]) -> _Chunk:
        rows: list[Row] = []
        places: list[int] = []
        bad: list[str] = []
        long: list[str] = []
        unread: Counter[str] = Counter()
        for value in values:
            try:
                rows.append(row_of(value, self.source, columns=self.settings.columns))
                places.append(value.place)
            except InputError as error:
                bad.append(str(error))
        made = _Made()
        examples = tokenize(rows, self.chat, self.settings)
        for place, row, example in zip(places, rows, examples, strict=True):
            keys = {*row.unread, *self.chat.unread(row)}
            if isinstance(example, LongRowError) and self.settings.long_rows == "drop":
                long.append(str(example))
            elif isinstance(example, InputError):
                bad.append(str(example))
            else:
                made.add(place, example, self.chat.header_ids)
                keys |= example.unread
            unread.update(sorted(keys))
        return _Chunk(made.batch(), len(values), bad, long, unread)


def write_tokenized(path: Path, source: str, settings: RowSettings, chat: Chat) -> Facts:
    """Write a source's rows to an Arrow stream of `SCHEMA`.

    Raises:
        MissingFileError: no such file.
        InputError: names file and line of rows that cannot be used, unless they are dropped.
    """
    header, digest = chat.header_ids, checksum_of(source)
    facts = Facts(source, chat.fingerprint, chat.template_sha256, header, digest)
    findings = Findings(source, settings.bad_rows)
    kept: list[pa.RecordBatch] = []
    long: list[str] = []
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        bar(f"tokenizing {Path(source).name}", None, "rows") as progress,
    ):
        for chunk in _chunks(_Work(source, settings, chat)):
            findings.read += chunk.read
            findings.add_problems(chunk.bad)
            findings.unread += chunk.unread
            facts.long += len(chunk.long)
            long += chunk.long[: NAMED - len(long)]
            kept.append(chunk.batch)
            if len(kept) == _BATCHES_KEPT:
                writer.write_table(pa.Table.from_batches(kept).combine_chunks())
                kept.clear()
            progress.update(chunk.read)
        if kept:
            writer.write_table(pa.Table.from_batches(kept).combine_chunks())
    if findings.bad and findings.bad_rows == "refuse":
        findings.tell()
    facts.read, facts.bad = findings.read, findings.bad
    facts.problems = [*findings.problems, *long][:NAMED]
    facts.unread = dict(findings.unread)
    return facts


def _chunks(work: _Work) -> Iterator[_Chunk]:
    """A source's chunks in order; of a large source by other processes, one a core.

    They are forked, so that each has the tokenizer as it is. A few chunks wait for each, and no
    more: rows do not pile up in memory.
    """
    values = values_of(work.source)
    parts = iter(lambda: list(islice(values, _AT_ONCE)), [])
    yield from map(work, islice(parts, _ALONE))
    first = next(parts, None)
    if first is None:
        return
    parts = chain([first], parts)
    cores = usable_cores()
    if cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, parts)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, context, _begin, (work,)) as others:
        waiting: deque[Future[_Chunk]] = deque()
        try:
            for part in parts:
                waiting.append(others.submit(_in_process, part))
                if len(waiting) > 4 * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                f"{work.source}: a process that tokenized it was killed, as where memory runs out"
            ) from None
        finally:
            others.shutdown(wait=False, cancel_futures=True)


_work: _Work | None = None  # of a process of the pool


def _begin(work: _Work) -> None:
    global _work
    gc.freeze()  # what was imported before the fork is looked through no more
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    _work = work
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End with the process that started this one, however that ends."""
    while os.getppid() == parent:
        time.sleep(_LOOKS_EVERY)
    os._exit(1)


def _in_process(values: list[Value]) -> _Chunk:
    assert _work is not None
    return _work(values)


class _Made:
    """Examples on their way into a record batch."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._turns: list[Turn] = []
        self._counts: list[int] = []
        self._keys: list[bytes] = []
        self._places: list[int] = []
        self._is_cut: list[bool] = []

    def add(self, place: int, example: TokenizedExample, header: Sequence[int]) -> None:
        self._ids.append(example.ids)
        self._turns += example.turns
        self._counts.append(len(example.turns))
        self._keys += key_bytes_of(example, header)
        self._places.append(place)
        self._is_cut.append(example.is_cut)

    def batch(self) -> pa.RecordBatch:
        counts = np.array(self._counts, dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        turns = np.array(self._turns, dtype=np.int32).reshape(-1)
        key_ends = np.concatenate([[0], np.cumsum((1 + counts) * KEY_BYTES)]).astype(np.int64)
        buffers = [None, pa.py_buffer(key_ends), pa.py_buffer(b"".join(self._keys))]
        return pa.record_batch(
            [
                lists_of(np.cumsum([len(ids) for ids in self._ids]), array_of(ids)),
                lists_of(np.cumsum(4 * counts), array_of(turns)),
                pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(counts), buffers),
                array_of(np.array(self._places, dtype=np.int64)),
                array_of(np.array(self._is_cut, dtype=np.uint8)),
            ],
            schema=SCHEMA,
        )

"""Tokenized rows in memory-mapped Arrow, so that no count of rows fills the memory, and a known
file costs no tokenizer.

They are kept where `datasets` keeps its own (HF_DATASETS_CACHE, or HF_HOME), each source in a
folder that is named by all that decides what is in it. A store still decides what is known: keys
that it does not hold are worth nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pact_offline.arrow import array_of, numbers
from pact_offline.errors import InputError, PactError
from pact_offline.files import remembered_checksum, sha256_file, write_json
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import installed
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import KEY_BYTES, TokenizedExample
from pact_offline.rows.files import is_hub, origin_of, suffix_of
from pact_offline.rows.read import tell_unread
from pact_offline.rows.spans import Turn
from pact_offline.rows.tokenizing import SCHEMA, Facts, write_tokenized
from pact_offline.settings.stages import RowSettings

log = logging.getLogger(__name__)

_VERSION = "pact-offline rows 7"
_ROWS, _FACTS = "rows.arrow", "facts.json"
_KEPT_BYTES = 16 << 30
_ABANDONED_AFTER = 24 * 3600.0


class TokenizedRows:
    """The rows of one or more sources that are trained, in order, by their index."""

    def __init__(self, facts: Sequence[Facts], tables: Sequence[pa.Table], files: list[Path]):
        self.facts, self.tables, self.files = [*facts], [*tables], files
        self._batches = [_Batch(b) for table in tables for b in table.to_batches() if len(b)]
        self._ends = np.cumsum([len(batch.place) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[_Batch, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        return batch, index - (int(self._ends[number]) - len(batch.place))

    def __getitem__(self, index: int) -> TokenizedExample:
        batch, row = self._find(index)
        ids = batch.ids[batch.id_ends[row] : batch.id_ends[row + 1]]
        turns = tuple(Turn(*place) for place in batch.places(row, row + 1).tolist())
        return TokenizedExample(ids, turns, bool(batch.is_cut[row]))

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    def origin(self, index: int) -> str:
        """File and line of a row."""
        batch, row = self._find(index)
        ends = np.cumsum([len(table) for table in self.tables])
        facts = self.facts[int(np.searchsorted(ends, index, side="right"))]
        return origin_of(facts.source, int(batch.place[row]))

    @property
    def places(self) -> np.ndarray:
        """Line, or number, of each row in its source, int64 [rows]."""
        return _joined([batch.place for batch in self._batches])

    @property
    def sources(self) -> np.ndarray:
        """Number of each row's source, int64 [rows]."""
        return np.repeat(np.arange(len(self.tables)), [len(table) for table in self.tables])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return _joined([np.diff(batch.id_ends) for batch in self._batches])

    def first_with_id_from(self, size: int) -> tuple[int, int] | None:
        """The first row that has a token id of a size or above, and that id; None: none has."""
        begin = 0
        for batch in self._batches:
            found = np.flatnonzero(batch.ids[batch.id_ends[0] : batch.id_ends[-1]] >= size)
            if len(found):
                at = batch.id_ends[0] + found[0]
                row = int(np.searchsorted(batch.id_ends, at, side="right")) - 1
                return begin + row, int(batch.ids[at])
            begin += len(batch.place)
        return None

    @property
    def turns(self) -> np.ndarray:
        """Trained answers of each row, int64 [rows]."""
        return _joined([np.diff(batch.turn_ends) // 4 for batch in self._batches])

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of each answer, from where it is generated, int64 [turns of all rows]."""
        return self._until_the_end(0)

    @property
    def turn_steps(self) -> np.ndarray:
        """Trained tokens of each answer, int64 [turns of all rows]."""
        return self._until_the_end(1)

    @cached_property
    def steps(self) -> np.ndarray:
        """Trained tokens of each row, int64 [rows]."""
        before = _joined([[0], np.cumsum(self.turn_steps)])
        return np.diff(before[np.cumsum(self.turns)], prepend=0)

    @cached_property
    def longest_turn(self) -> int:
        """Steps of the longest answer, counted from its own text."""
        return int(self._until_the_end(2).max(initial=0))

    @property
    def scaffolds(self) -> np.ndarray:
        """Trained tokens of each answer before its own text, int32 [turns of all rows]."""
        return np.asarray(self.turn_steps - self._until_the_end(2), np.int32)

    def _until_the_end(self, place: int) -> np.ndarray:
        """Tokens of each answer from one of its places on, int64 [turns of all rows]."""
        found = [batch.places() for batch in self._batches]
        return _joined([places[:, 3] - places[:, place] for places in found])

    @property
    def is_cut(self) -> np.ndarray:
        """Whether each row was cut, bool [rows]."""
        return np.concatenate([np.zeros(0, bool), *(batch.is_cut for batch in self._batches)])

    @cached_property
    def keys(self) -> pa.FixedSizeBinaryArray:
        """Context keys, one after the other: of each row the full one, then one for each turn."""
        data = b"".join(batch.keys for batch in self._batches)
        return pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(KEY_BYTES), len(data) // KEY_BYTES, [None, pa.py_buffer(data)]
        )

    @property
    def full_keys(self) -> pa.FixedSizeBinaryArray:
        """Key of each row's full context."""
        starts = np.concatenate([[0], self.key_ends[:-1]]).astype(np.int64)
        return self.keys.take(array_of(starts))

    @cached_property
    def key_ends(self) -> np.ndarray:
        """Where each row's keys end, int64 [rows]."""
        return np.cumsum(1 + self.turns)

    def digest(self) -> str:
        """SHA-256 over every key and all that `keys` do not tell, 64 hex digits."""
        digest = hashlib.sha256(self.keys.buffers()[1])
        digest.update(self.turns.tobytes())
        for batch in self._batches:
            digest.update(batch.places().tobytes())
        return digest.hexdigest()


class _Batch:
    """A record batch's columns as numpy arrays over its buffers."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, turns, keys, place, is_cut = (batch.column(name) for name in SCHEMA.names)
        self.id_ends, self.turn_ends = _ends(ids), _ends(turns)
        self.ids, self.turns = numbers(ids.values), numbers(turns.values)
        self.place = numbers(place)
        key_ends = _ends(keys)
        self.keys = memoryview(keys.buffers()[2])[key_ends[0] : key_ends[-1]]
        self.is_cut = numbers(is_cut).astype(bool)

    def places(self, first: int = 0, end: int = -1) -> np.ndarray:
        """Header, start, first and end of each turn of some rows, int32 [turns, 4]."""
        return self.turns[self.turn_ends[first] : self.turn_ends[end]].reshape(-1, 4)


def _ends(array: Any) -> np.ndarray:
    offsets = np.frombuffer(array.buffers()[1], np.int64)
    return offsets[array.offset : array.offset + len(array) + 1]


def _joined(parts: Sequence[np.ndarray | list[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def tokenized_rows(
    model: ModelFiles,
    sources: Sequence[str | Path],
    settings: RowSettings,
    load_chat: Callable[[], Chat],
) -> TokenizedRows:
    """The rows of some sources, tokenized now or before.

    Args:
        model: whose tokenizer it is.
        sources: row files or hub datasets.
        settings: which tokens of which rows.
        load_chat: called where a source is not known.

    Raises:
        MissingFileError: no such file.
        InputError: names file and line of rows that cannot be used, all of a source at once.
    """
    return joined([tokenized_source(model, str(s), settings, load_chat) for s in sources])


def joined(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """Rows of several sources, one after the other."""
    return TokenizedRows(
        [facts for part in parts for facts in part.facts],
        [table for part in parts for table in part.tables],
        [file for part in parts for file in part.files],
    )


def tokenized_by(
    chat: Chat, sources: Sequence[str | Path], settings: RowSettings, *, told: bool = True
) -> TokenizedRows:
    """`tokenized_rows` by a chat that is at hand, whose files are not known; nothing is kept.

    The rows lie in a folder until this process ends, for data-loader workers and what `datasets`
    makes of them.

    Args:
        chat: template and tokenizer.
        sources: row files or hub datasets.
        settings: which tokens of which rows.
        told: say what is left out, and refuse a source of which no row is left.
    """
    parts = []
    for source in map(str, sources):
        folder = Path(tempfile.mkdtemp(prefix="pact-offline-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        facts = _written(folder, source, settings, chat)
        found = _open(folder, source)
        assert found is not None
        if told:
            _tell(facts, len(found), settings)
        parts.append(found)
    return joined(parts)


def _written(folder: Path, source: str, settings: RowSettings, chat: Chat) -> Facts:
    try:
        facts = write_tokenized(folder / _ROWS, source, settings, chat)
        write_json(folder / _FACTS, asdict(facts))
    except OSError as error:
        if isinstance(error, PactError):
            raise
        raise InputError(
            f"{folder}: the tokens of {source} cannot be written: {error.strerror or error}; "
            "HF_DATASETS_CACHE and TMPDIR name other places"
        ) from None
    return facts


def tokenized_source(
    model: ModelFiles, source: str, settings: RowSettings, load_chat: Callable[[], Chat]
) -> TokenizedRows:
    """`tokenized_rows` of one source."""
    if is_hub(source):  # no file's bytes name it
        return tokenized_by(load_chat(), [source], settings)
    place = _home() / _name_of(model, source, settings)
    found = _open(place, source)
    if found is None:
        chat = load_chat()
        tokenize_to(place, source, settings, chat)
        found = _open(place, source)
        if found is None:  # there is nowhere to keep it
            return tokenized_by(chat, [source], settings)
    _tell(found.facts[0], len(found), settings)
    return found


def _home() -> Path:
    """Where `datasets` keeps what it has read; found without importing it, which takes a second."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "huggingface"
    )
    place = os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets"
    return Path(place).expanduser() / "pact-offline-rows"


def _name_of(model: ModelFiles, source: str, settings: RowSettings) -> str:
    """Names all that decides what a source's file is tokenized to."""
    parts = [
        _VERSION,
        *(f"{name} {installed(name)}" for name in ("transformers", "tokenizers", "jinja2")),
        settings.model_dump_json(include={*RowSettings.model_fields}),
        suffix_of(Path(source)),
        sha256_file(Path(source)),
    ]
    if settings.chat_template is not None:
        parts.append(sha256_file(Path(settings.chat_template)))
    for file in sorted([*model.path.iterdir(), *model.path.glob("additional_chat_templates/*")]):
        if file.is_file() and file.suffix != ".safetensors":
            parts.append(f"{file.name} {remembered_checksum(file)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _open(folder: Path, source: str) -> TokenizedRows | None:
    """What a folder holds, whatever its file was called then; None where it is not whole."""
    try:
        facts = Facts(**json.loads((folder / _FACTS).read_text(encoding="utf-8")))
        with pa.memory_map(str(folder / _ROWS)) as file:
            table = pa.ipc.open_stream(file).read_all()
        if table.schema != SCHEMA:
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)  # the least used are removed first
    except (OSError, ValueError, TypeError, RecursionError, pa.ArrowException):
        return None
    facts.problems = [f"{source}{problem.removeprefix(facts.source)}" for problem in facts.problems]
    facts.source = source
    return TokenizedRows([facts], [table], [folder / _ROWS])


def tokenize_to(folder: Path, source: str, settings: RowSettings, chat: Chat) -> None:
    """Tokenize a source into a folder, whole or, as where there is no place, not at all.

    Raises:
        InputError: names file and line of rows that cannot be used.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        aside.mkdir()
    except OSError:
        return
    try:
        _written(aside, source, settings, chat)
        with contextlib.suppress(OSError):  # it is there: another process was first
            aside.rename(folder)
        if _open(folder, source) is None:  # or it is broken
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                aside.rename(folder)
        _remove_oldest(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tell(facts: Facts, rows: int, settings: RowSettings) -> None:
    """Say what is left out and what nothing reads.

    Raises:
        InputError: no row is left.
    """
    tell_unread(facts.source, facts.unread)
    if not facts.bad and not facts.long:
        return
    for problem in facts.problems:
        log.warning("%s", problem)
    parts = [f"{facts.bad:,} that cannot be used"] if facts.bad else []
    parts += [f"{facts.long:,} with no response within {settings.max_tokens}"] if facts.long else []
    left_out = f"{' and '.join(parts)} of {facts.read:,} rows"
    if not rows:
        raise InputError(f"{facts.source}: expected rows to train, found none: {left_out}")
    log.warning("%s: left out: %s", facts.source, left_out)


def _remove_oldest(newest: Path) -> None:
    """Keep a folder, and beside it those that were used last, up to 16 GiB."""
    with contextlib.suppress(OSError):
        for left in newest.parent.glob(".*"):  # of a process that was killed a day ago
            if left.is_dir() and time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(left, ignore_errors=True)
        folders = [folder for folder in newest.parent.iterdir() if (folder / _FACTS).is_file()]
        total = 0
        for folder in sorted(folders, key=lambda folder: -folder.stat().st_mtime):
            total += (folder / _ROWS).stat().st_size
            if total > _KEPT_BYTES and folder != newest:
                shutil.rmtree(folder, ignore_errors=True)

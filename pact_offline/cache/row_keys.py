"""The context keys of a dataset's rows, in an Arrow file beside its targets.json."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pact_offline.arrow import array_of, lists_of, numbers
from pact_offline.cache.plain_arrow import read_table, to_bytes
from pact_offline.errors import DamagedError, MissingFileError, PactError, StoreError
from pact_offline.files import sha256_file, written_aside
from pact_offline.rows.contexts import KEY_BYTES

SCHEMA = pa.schema(
    [
        ("keys", pa.large_list(pa.binary(KEY_BYTES))),  # the full context's, then each turn's
        ("source", pa.int32()),
        ("place", pa.int64()),
        ("scaffold", pa.large_list(pa.int32())),  # of each turn
    ]
)


@dataclass(frozen=True)
class RowKeys:
    """Which contexts belong to which row.

    Attributes:
        keys: fixed-size binary [contexts]: of each row its full context's, then one for each turn.
        ends: int64 [rows], where each row's keys end.
        sources: int32 [rows], number of each row's source.
        places: int64 [rows], its line there.
        scaffolds: int32 [turns of all rows], response steps before the answer's own text.
    """

    keys: pa.FixedSizeBinaryArray
    ends: np.ndarray
    sources: np.ndarray
    places: np.ndarray
    scaffolds: np.ndarray

    @classmethod
    def of(cls, rows: list[list[str]]) -> RowKeys:
        """Keys in hex digits, of rows of one source."""
        data = bytes.fromhex("".join(key for keys in rows for key in keys))
        count = len(data) // KEY_BYTES
        keys = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(KEY_BYTES), count, [None, pa.py_buffer(data)]
        )
        ends = np.cumsum([len(keys) for keys in rows], dtype=np.int64)
        places = np.arange(1, len(rows) + 1, dtype=np.int64)
        scaffolds = np.zeros(count - len(rows), np.int32)
        return cls(keys, ends, np.zeros(len(rows), np.int32), places, scaffolds)

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each row's keys begin, int64 [rows]: at its full context's."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    @cached_property
    def turn_ends(self) -> np.ndarray:
        """Where each row's turns end among those of all rows, int64 [rows]."""
        return np.asarray(self.ends - np.arange(1, len(self) + 1), dtype=np.int64)

    @property
    def data(self) -> bytes:
        """Every key's bytes, one after the other."""
        at = self.keys.offset * KEY_BYTES
        buffer = self.keys.buffers()[1]
        return b"" if buffer is None else bytes(buffer[at : at + len(self.keys) * KEY_BYTES])

    @property
    def digest(self) -> str:
        """SHA-256 over the keys of each row, 64 hex digits."""
        return hashlib.sha256(self.ends.astype("<i8").tobytes() + self.data).hexdigest()

    def first_difference(self, other: RowKeys) -> int | None:
        """The first row whose contexts are others; None where all are the same."""
        ours, theirs = self.data, other.data
        if np.array_equal(self.ends, other.ends) and ours == theirs:
            return None
        for row in range(min(len(self), len(other))):
            start, end = KEY_BYTES * int(self.starts[row]), KEY_BYTES * int(self.ends[row])
            if self.ends[row] != other.ends[row] or ours[start:end] != theirs[start:end]:
                return row
        return min(len(self), len(other))

    def save(self, targets: Path) -> str:
        """Write the file beside a targets.json; its SHA-256, 64 hex digits."""
        columns = [
            lists_of(self.ends, self.keys),
            array_of(self.sources.astype(np.int32)),
            array_of(self.places.astype(np.int64)),
            lists_of(self.turn_ends, array_of(self.scaffolds.astype(np.int32))),
        ]
        data = to_bytes(pa.table(columns, schema=SCHEMA))
        digest = hashlib.sha256(data).hexdigest()
        place, is_there = keys_place(targets, digest), False
        with suppress(PactError, OSError):
            is_there = sha256_file(place) == digest
        if not is_there:
            with written_aside(place) as aside:
                aside.write_bytes(data)
        return digest

    @classmethod
    def load(cls, targets: Path, digest: str) -> RowKeys:
        """Read the file beside a targets.json, or beside what a link to one leads to.

        Raises:
            StoreError: there is none, or not with these bytes.
        """
        path = keys_place(targets.resolve(), digest)
        try:
            found = sha256_file(path)
        except MissingFileError:
            raise StoreError(
                f"{targets}: expected its rows' keys in {path}, found no such file; move both "
                "together, or run `pact-offline score` again"
            ) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
        if found != digest:
            raise DamagedError(f"{path}: expected the bytes that were written, found others")
        table = read_table(path, SCHEMA, str(path)).combine_chunks()
        if not len(table):
            raise DamagedError(f"{path}: expected the keys of rows, found none")
        lists = table["keys"].chunk(0)
        offsets = numbers(lists.offsets)
        if (np.diff(offsets) < 2).any():
            raise DamagedError(f"{path}: keys: expected two or more of each row, found fewer")
        if offsets[0] or offsets[-1] != len(lists.values):
            raise DamagedError(f"{path}: keys: expected those of rows, found others beside them")
        sources, places = (numbers(table[name].chunk(0)) for name in ("source", "place"))
        turns = table["scaffold"].chunk(0)
        found_keys = cls(lists.values, offsets[1:], sources, places, numbers(turns.values))
        if not np.array_equal(numbers(turns.offsets)[1:], found_keys.turn_ends):
            raise DamagedError(f"{path}: scaffold: expected one of each turn, found otherwise")
        return found_keys


def keys_place(targets: Path, digest: str) -> Path:
    """Where the keys of a targets.json lie: its name is taken, none is read from a file."""
    return targets.with_name(f"{_stem(targets)}-{digest[:12]}.arrow")


def remove_keys(targets: Path, *, but: str = "") -> None:
    """Remove what was written for a targets.json of this name, but for the keys of one SHA-256.

    A file that is not named by its own bytes is not ours.
    """
    for place in targets.parent.glob(f"{_escaped(_stem(targets))}-{'[0-9a-f]' * 12}.arrow"):
        with suppress(PactError, OSError):
            digest = sha256_file(place)
            if digest != but and place == keys_place(targets, digest):
                place.unlink()


def _stem(targets: Path) -> str:
    return targets.name.removesuffix(".json")  # of "0.5" and "0.7" all that tells them apart


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)

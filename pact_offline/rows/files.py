"""The values in a file of rows, one by one: JSON lines, a JSON array, CSV, Parquet, Arrow; gzip or
zstd around each; or a dataset of the Hugging Face hub.

They are read as they stand, and not through the one type a column that `datasets` would give them:
a key that a row lacks is not there, a number stays a number, and each value has its line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa

from pact_offline.errors import InputError, first_line
from pact_offline.files import parse_json, require_file, sha256_file
from pact_offline.models.locate import looks_like_path

Kind = Literal["parquet", "arrow", "csv", "json array", "json lines"]
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
_NO_ROWS = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a ZIP file, as .xlsx is too; unpack it, or export it as CSV in UTF-8",
    b"\xfd7zXZ\x00": "a file packed by xz; unpack it",
    b"BZh91AY&SY": "a file packed by bzip2; unpack it",
    b"version https://": "a pointer of Git LFS; git lfs pull fetches the file",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}  # what else a file may begin with
_BATCH_ROWS = 1024
_LONGEST_CELL = 2**31 - 1
_SPACE = re.compile(r"[ \t\n\r]*")
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*"|\[\s*[{\]])')


class Value(NamedTuple):
    """One value of a source.

    Attributes:
        place: its line, or its number among the rows; from 1.
        value: what stands there; None with a problem.
        problem: in one line, why it cannot be read.
    """

    place: int
    value: Any
    problem: InputError | None = None


def origin_of(source: str, place: int) -> str:
    """Where a row stands, for people."""
    return f"{source}:{place}"


def is_hub(source: str) -> bool:
    return source.startswith("hub:")


def checksum_of(source: str) -> str | None:
    """SHA-256 of a source's file, 64 hex digits; None for the hub."""
    return None if is_hub(source) else sha256_file(Path(source))


def values_of(source: str) -> Iterator[Value]:
    """Every value of a source, in order.

    Args:
        source: a path, or hub:NAME[:CONFIG[:SPLIT]][@REVISION].

    Raises:
        MissingFileError: no such file.
        InputError: the source as a whole cannot be read, or is empty.
    """
    values = _hub_values(source) if is_hub(source) else _file_values(Path(source))
    is_empty = True
    for value in values:
        is_empty = False
        yield value
    if is_empty:
        raise InputError(f"{source}: expected rows, found none")


def suffix_of(path: Path) -> str:
    """How a file's name says that it is to be read, whatever it is packed in."""
    name = path.name.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _file_values(path: Path) -> Iterator[Value]:
    require_file(path)
    try:
        with opened(path) as stream:
            yield from _READERS[kind_of(path, stream)](path, stream)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None


def kind_of(path: Path, stream: io.BufferedReader) -> Kind:
    """What a file is, by how it begins and its name.

    Raises:
        InputError: it begins as a file of another kind does.
    """
    suffix = suffix_of(path)
    start = stream.peek(16)[:16]
    for beginning, other in _NO_ROWS.items():
        if start.startswith(beginning) or start.lower().startswith(beginning):
            raise InputError(f"{path}: expected rows, found {other}")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"ARROW1") or suffix in (".arrow", ".feather"):
        return "arrow"
    if suffix in (".csv", ".tsv"):
        return "csv"
    is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    return "json array" if is_array else "json lines"


def opened(path: Path) -> io.BufferedReader:
    """A file's bytes, unpacked."""
    file = path.open("rb")
    start = file.peek(4)
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind is None:
        return file
    return io.BufferedReader(_Unpacked(file, kind), 1 << 20)


class _Unpacked(io.RawIOBase):
    """Arrow's decompressor as Python's own kind of stream, which is read in lines."""

    def __init__(self, file: IO[bytes], kind: str) -> None:
        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _decoded(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}:{line}" if line else str(path)
        raise InputError(
            f"{where}: expected UTF-8 text, found byte {error.start} invalid"
        ) from None


def _json_lines(path: Path, stream: io.BufferedReader) -> Iterator[Value]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            text = _decoded(line, path, number)
            yield Value(number, parse_json(text, str(path), line=number))
        except InputError as error:
            if line.rstrip()[-1:] in b"{[,":  # a value goes on in the next line
                error = InputError(f"{error}; a row stands on one line, or all in a JSON array")
            yield Value(number, None, error)


def _json_array(path: Path, stream: io.BufferedReader) -> Iterator[Value]:
    """The items of an array, each by the line it begins at; one at a time in memory."""
    text = _decoded(stream.read().removeprefix(b"\xef\xbb\xbf"), path)
    return (Value(item.line, item.value) for item in array_items(text, path))


class Item(NamedTuple):
    """An item of a JSON array: its line, its value, and where its text lies."""

    line: int
    value: Any
    start: int
    end: int


def array_items(text: str, path: Path) -> Iterator[Item]:
    """The items of a JSON array, in order.

    Raises:
        InputError: names the line where it is none.
    """
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)
    line, counted = 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise InputError(f"{path}:{error.lineno}: expected JSON, found: {problem}") from None
        except (ValueError, RecursionError):
            parse_json(text[at:], str(path), line=line)  # says what is wrong with it
            raise InputError(f"{path}:{line}: expected JSON, found otherwise") from None
        yield Item(line, value, at, end)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        lists = text[at : at + 1] == "]" and text[_skip(text, at + 1)] == "["
        hint = '; a list in each line is no row, {"messages": [...]} is' if lists else ""
        raise InputError(f"{path}:{line}: expected the end of a JSON array, found otherwise{hint}")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def delimiter_of(path: Path, stream: io.BufferedReader) -> str:
    """What stands between the cells of a CSV file: where no comma is in its header, as Excel has it
    for many languages, a semicolon or a tab, if the next line has as many.
    """
    if suffix_of(path) == ".tsv":
        return "\t"
    header, *lines = re.split(rb"[\r\n]+", stream.peek().removeprefix(b"\xef\xbb\xbf"), maxsplit=2)
    others = () if b"," in header else (b";", b"\t")
    found = (o for o in others if 0 < header.count(o) <= (lines[0] if lines else header).count(o))
    return next(found, b",").decode()


def _not_utf8(path: Path, line: int, cells: list[str]) -> InputError | None:
    """What is wrong with the cells of a line that was decoded with `surrogateescape`."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        return InputError(
            f"{path}:{line}: expected UTF-8 text, found the byte {byte:#04x}; save it as UTF-8, in "
            "Excel as CSV UTF-8"
        )
    return None


def _csv(path: Path, stream: io.BufferedReader) -> Iterator[Value]:
    csv.field_size_limit(_LONGEST_CELL)
    if _JSON.match(stream.peek()):
        raise InputError(
            f"{path}:1: expected CSV, as its name says, found JSON; name it .jsonl or .json"
        )
    delimiter = delimiter_of(path, stream)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if problem := _not_utf8(path, 1, names):
            raise problem
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path}:1: expected distinct columns, found {doubled!r} twice")
        line = reader.line_num + 1
        is_header_alone = bool(names)
        for cells in reader:
            if any(cells):  # else blank, or delimiters alone, as spreadsheets leave them at the end
                problem = _not_utf8(path, line, cells)
                if problem is None and len(cells) != len(names):
                    found = f"expected {len(names)} cells, found {len(cells)}"
                    problem = InputError(f"{path}:{line}: {found}")
                is_header_alone = False
                row = None if problem else dict(zip(names, cells, strict=True))
                yield Value(line, row, problem)
            line = reader.line_num + 1
        if is_header_alone:
            raise InputError(f"{path}: expected rows below the header, found none")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: expected CSV, found: {error}") from None
    finally:
        text.detach()


def seekable(stream: io.BufferedReader) -> Any:
    raw = stream.raw
    return pa.BufferReader(stream.read()) if isinstance(raw, _Unpacked) else pa.PythonFile(stream)


def _parquet(path: Path, stream: io.BufferedReader) -> Iterator[Value]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(seekable(stream))
    yield from _batches(file.iter_batches(_BATCH_ROWS))


def _arrow(path: Path, stream: io.BufferedReader) -> Iterator[Value]:
    file = seekable(stream)
    try:
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(0)
        batches = iter(pa.ipc.open_stream(file))
    yield from _batches(batches)


def _batches(batches: Iterator[pa.RecordBatch]) -> Iterator[Value]:
    place = 0
    for batch in batches:
        for value in batch.to_pylist():
            place += 1
            yield Value(place, _unfilled(value))


_READERS: dict[Kind, Callable[[Path, io.BufferedReader], Iterator[Value]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "json array": _json_array,
    "json lines": _json_lines,
}


def _unfilled(value: Any, *, in_list: bool = False) -> Any:
    """A row without the nulls that the one type of a column's lists, as of messages, fills in."""
    if isinstance(value, list):
        return [_unfilled(item, in_list=True) for item in value]
    if isinstance(value, dict):
        kept = value.items() if not in_list else [i for i in value.items() if i[1] is not None]
        return {key: _unfilled(item, in_list=in_list) for key, item in kept}
    return value


def _hub_values(source: str) -> Iterator[Value]:
    for number, value in enumerate(hub_dataset(source), start=1):
        yield Value(number, _unfilled(value))


def hub_dataset(source: str) -> Any:
    """A dataset of the hub, or of a folder that is laid out like one.

    Raises:
        InputError: there is none, or it has other configurations or splits, which are named.
    """
    import datasets

    rest, _, revision = source.removeprefix("hub:").partition("@")
    name, *parts = rest.split(":")
    if not name or len(parts) > 2 or not all(parts):
        raise InputError(
            f"{source}: expected hub:NAME[:CONFIG[:SPLIT]][@REVISION], found otherwise"
        )
    if looks_like_path(name) and not Path(name).exists():
        raise InputError(f"{source}: cannot be read as a dataset: no such folder")
    options: dict[str, Any] = {"revision": revision or None}
    try:
        if len(parts) == 1:  # of a dataset with one configuration, a split
            configs = datasets.get_dataset_config_names(name, **options)
            config = parts[0] if parts[0] in configs else None
            split = None if config else parts[0]
        else:
            config, split = parts or (None, None)
        return datasets.load_dataset(name, config, split=split or "train", **options)
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        reason = reason.partition(" Example of usage")[0][:400] or type(error).__name__
        if error.__cause__ is not None:  # such as what is wrong with a file of it
            reason += f": {first_line(error.__cause__)}"
        raise InputError(f"{source}: cannot be read as a dataset: {reason}") from None

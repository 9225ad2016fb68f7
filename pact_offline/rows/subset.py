"""Some rows of a file as a file of the same format, each as it stands there."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pact_offline.errors import InputError, first_line
from pact_offline.files import written_aside
from pact_offline.rows.files import (
    Kind,
    array_items,
    delimiter_of,
    is_hub,
    kind_of,
    opened,
    seekable,
    suffix_of,
)

_BOM = b"\xef\xbb\xbf"


def write_subset(source: str, kept: np.ndarray, output: Path) -> None:
    """Write the rows of a source that are kept; packed as the output's name says.

    Args:
        source: a file, as `values_of` reads it.
        kept: bool [values], in the order of `values_of`.
        output: file to write, whose name ends as the source's does.

    Raises:
        InputError: a source of the hub, or a name that says another format.
    """
    if is_hub(source):
        raise InputError(f"{source}: expected a file, found a dataset of the hub")
    path = Path(source)
    if suffix_of(output) != suffix_of(path):
        raise InputError(
            f"{output}: expected a name that ends in {suffix_of(path) or 'nothing'}, as the "
            "format of the rows is kept"
        )
    try:
        with opened(path) as stream, written_aside(output) as aside:
            kind = kind_of(path, stream)
            with _packed(aside, output.name) as out:
                _WRITERS[kind](path, stream, kept, out)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be copied: {first_line(error)}") from None


@contextmanager
def _packed(aside: Path, name: str) -> Iterator[IO[bytes]]:
    """A file to write to, which packs as a name says."""
    with aside.open("wb") as file:
        if name.lower().endswith((".gz", ".gzip")):
            with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif name.lower().endswith((".zst", ".zstd")):
            with pa.CompressedOutputStream(pa.PythonFile(file, "w"), "zstd") as packed:
                yield packed
        else:
            yield file


def _json_lines(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    number = 0
    for line in stream:
        if not line.removeprefix(_BOM).strip():
            continue
        if kept[number]:
            out.write(line if line.endswith(b"\n") else line + b"\n")
        number += 1


def _json_array(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    text = stream.read().removeprefix(_BOM).decode("utf-8")
    items = zip(array_items(text, path), kept, strict=True)
    texts = [text[item.start : item.end] for item, is_kept in items if is_kept]
    out.write(("[\n" + ",\n".join(texts) + "\n]\n").encode())


def _csv(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in text:
            read.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter_of(path), strict=True)
    number = -1  # the names of the columns
    for cells in reader:
        record = "".join(read)
        read.clear()
        if cells and (number < 0 or kept[number]):
            out.write(record.encode() if record.endswith("\n") else f"{record}\n".encode())
        number += bool(cells)
    text.detach()


def _parquet(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(seekable(stream)).read()
    with pa.PythonFile(out, "w") as file:
        pq.write_table(table.filter(pa.array(kept)), file)


def _arrow(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    file = seekable(stream)
    new: Any = pa.ipc.new_file
    try:
        table = pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid:
        file.seek(0)
        table, new = pa.ipc.open_stream(file).read_all(), pa.ipc.new_stream
    with pa.PythonFile(out, "w") as sink, new(sink, table.schema) as writer:
        writer.write_table(table.filter(pa.array(kept)))


_WRITERS: dict[Kind, Callable[[Path, io.BufferedReader, np.ndarray, IO[bytes]], None]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "json array": _json_array,
    "json lines": _json_lines,
}

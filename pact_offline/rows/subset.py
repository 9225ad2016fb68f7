"""Some rows of a file as a file of the same format, each as it stands there."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pact_offline.errors import InputError, first_line
from pact_offline.files import written_aside
from pact_offline.rows.files import (
    Kind,
    array_items,
    delimiter_of,
    hub_dataset,
    is_hub,
    kind_of,
    opened,
    seekable,
    suffix_of,
)

_BOM = b"\xef\xbb\xbf"


class Subset(NamedTuple):
    """Some rows of a source.

    Attributes:
        source: as `values_of` reads it.
        kept: bool [values], in the order of `values_of`.
        output: file to write, whose name ends as the source's does; of the hub's rows as Parquet's.
    """

    source: str
    kept: np.ndarray
    output: Path


def write_subsets(subsets: Sequence[Subset]) -> None:
    """Write the rows of sources that are kept, of all or of none; packed as the outputs' names say.

    Raises:
        InputError: a name that says another format.
    """
    for source, _, output in subsets:
        of_hub = is_hub(source)
        suffix = ".parquet" if of_hub else suffix_of(Path(source))
        if suffix != suffix_of(output):
            why = (
                "which keeps the types of the hub's rows"
                if of_hub
                else "as the format of the rows is kept"
            )
            raise InputError(f"{output}: expected a name that ends in {suffix or 'nothing'}, {why}")
    with ExitStack() as written:
        for subset in subsets:
            _write(subset, written.enter_context(written_aside(subset.output)))


def _write(subset: Subset, aside: Path) -> None:
    path = Path(subset.source)
    try:
        with _packed(aside, subset.output.name) as out:
            if is_hub(subset.source):
                hub_dataset(subset.source).select(np.flatnonzero(subset.kept)).to_parquet(out)
                return
            with opened(path) as stream:
                _WRITERS[kind_of(path, stream)](path, stream, subset.kept, out)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"{subset.source}: cannot be copied: {first_line(error)}") from None


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
    for at, line in enumerate(stream):
        if not (line if at else line.removeprefix(_BOM)).strip():
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
    delimiter = delimiter_of(path, stream)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in text:
            read.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    number = -1  # the names of the columns
    for cells in reader:
        record = "".join(read)
        read.clear()
        is_header, is_value = number < 0, any(cells)
        if is_header or (is_value and kept[number]):
            record = record if record.endswith("\n") else f"{record}\n"
            out.write(record.encode("utf-8", "surrogateescape"))
        number += is_header or is_value
    text.detach()


def _parquet(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(seekable(stream)).read()
    with pa.PythonFile(out, "w") as file:
        pq.write_table(_filtered(table, kept), file)


def _arrow(path: Path, stream: io.BufferedReader, kept: np.ndarray, out: IO[bytes]) -> None:
    file = seekable(stream)
    new: Any = pa.ipc.new_file
    try:
        table = pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid:
        file.seek(0)
        table, new = pa.ipc.open_stream(file).read_all(), pa.ipc.new_stream
    with pa.PythonFile(out, "w") as sink, new(sink, table.schema) as writer:
        writer.write_table(_filtered(table, kept))


def _filtered(table: pa.Table, kept: np.ndarray) -> pa.Table:
    try:
        return table.filter(pa.array(kept))
    except pa.ArrowNotImplementedError:  # as of views of strings, which can only be sliced
        bounds = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0))
        runs = [table.slice(start, end - start) for start, end in bounds.reshape(-1, 2).tolist()]
        return pa.concat_tables([table.slice(0, 0), *runs])


_WRITERS: dict[Kind, Callable[[Path, io.BufferedReader, np.ndarray, IO[bytes]], None]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "json array": _json_array,
    "json lines": _json_lines,
}

"""Arrow files whose bytes are what they say: no compressed columns, no nulls, one schema."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa

from pact_offline.errors import DamagedError, StoreError


def read_table(path: Path, schema: pa.Schema, place: str) -> pa.Table:
    """The table of an Arrow file.

    Args:
        path: of the file.
        schema: that it has to have.
        place: of the file, for messages.

    Raises:
        DamagedError: no such table, or one with compressed columns, nulls or bad offsets.
        StoreError: the file cannot be read.
    """
    try:
        with pa.OSFile(str(path)) as file:
            _refuse_compressed(file, place)
            table = pa.ipc.open_stream(file).read_all()  # not what the footer may name beside it
            table.validate(full=True)
    except DamagedError:
        raise
    except OSError as error:
        raise StoreError(f"{place}: cannot be read: {error}") from None
    except (pa.ArrowException, struct.error, ValueError) as error:
        raise DamagedError(f"{place}: expected an Arrow table, found: {error}") from None
    if table.schema != schema or any(column.null_count for column in table.columns):
        raise DamagedError(f"{place}: expected the columns {', '.join(schema.names)}, found others")
    return table


def to_bytes(table: pa.Table) -> bytes:
    """An Arrow file with a table."""
    made = pa.BufferOutputStream()
    with pa.ipc.new_file(made, table.schema) as writer:
        writer.write_table(table)
    data: bytes = made.getvalue().to_pybytes()
    return data


def _refuse_compressed(file: pa.NativeFile, place: str) -> None:
    """Refuse compressed record batches: a few bytes could unpack to any number of rows.

    Arrow tells only after unpacking, so the field is looked up in the message: a flatbuffer table
    whose third field is the batch, whose fourth field is its compression.
    """
    file.seek(8)  # past the magic bytes a stream of messages follows
    for message in pa.ipc.MessageReader.open_stream(file):
        if message.type == "dictionary":
            raise DamagedError(f"{place}: expected plain columns, found a dictionary")
        if message.type != "record batch":
            continue
        data = message.metadata.to_pybytes()
        batch = _field(data, struct.unpack_from("<I", data)[0], 2)
        batch += struct.unpack_from("<I", data, batch)[0]
        if _field(data, batch, 3):
            raise DamagedError(f"{place}: expected plain columns, found compressed ones")
    file.seek(8)


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer table is; 0 where it is left out."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", data, layout + 4 + 2 * number)[0]
    return table + offset if offset else 0

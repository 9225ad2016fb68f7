"""Arrow arrays and numpy arrays over the same bytes; Arrow's own ways take a second, for pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def numbers(array: Any) -> np.ndarray:
    """An Arrow array of numbers, without nulls, as numpy's."""
    dtype = np.dtype(str(array.type))
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def array_of(values: np.ndarray) -> pa.Array:
    """Numpy's numbers as an Arrow array."""
    kind = pa.from_numpy_dtype(values.dtype)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def lists_of(ends: np.ndarray, values: pa.Array) -> pa.LargeListArray:
    """Lists that end at `ends` among some values."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return pa.LargeListArray.from_arrays(array_of(offsets), values)

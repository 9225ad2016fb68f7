"""How log-confidences are kept: exactly, in half precision, or in eight bits.

Every encoding keeps fixed-width records, one a step, so a step is found by its number alone and
nothing has to be unpacked for it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

StoredDtype = Literal["float32", "float16", "uint8"]

_LEVELS = 254
_MINUS_INFINITY = 255
_SQUARES = (np.arange(256, dtype=np.float32) / _LEVELS) ** 2
_SQUARES[_MINUS_INFINITY] = np.inf


def array_dtypes(stored_dtype: StoredDtype) -> dict[str, np.dtype]:
    """The arrays of an encoding and their dtypes, little-endian.

    `log_confidence` is [steps, safety ids]; `scale`, beside uint8 only, is [steps].
    """
    arrays = {"log_confidence": np.dtype(stored_dtype).newbyteorder("<")}
    if stored_dtype == "uint8":
        arrays["scale"] = np.dtype("<f2")
    return arrays


def encode(log_confidences: np.ndarray, stored_dtype: StoredDtype) -> dict[str, np.ndarray]:
    """Log-confidences as they are stored.

    uint8: code c stands for -scale * (c / 254)^2, where scale is the step's largest finite
    magnitude, and 255 for minus infinity. The square puts the fine levels where confidence is.

    Args:
        log_confidences: float [steps, safety ids], at most 0 up to rounding.
        stored_dtype: which encoding.

    Returns:
        the arrays of `array_dtypes`.
    """
    dtypes = array_dtypes(stored_dtype)
    if stored_dtype != "uint8":
        return {"log_confidence": log_confidences.astype(dtypes["log_confidence"])}
    magnitude = np.maximum(-log_confidences.astype(np.float32), 0)
    is_finite = np.isfinite(magnitude)
    finite = np.where(is_finite, np.minimum(magnitude, np.finfo(np.float16).max), 0)
    largest = finite.max(axis=1, initial=0)
    scale = largest.astype(np.float16)
    too_small = scale < largest
    scale[too_small] = np.nextafter(scale[too_small], np.float16(np.inf))
    shares = finite / np.maximum(scale.astype(np.float32), 1e-12)[:, None]
    codes = np.rint(np.sqrt(np.minimum(shares, 1)) * _LEVELS)
    codes[~is_finite] = _MINUS_INFINITY
    return {
        "log_confidence": codes.astype(np.uint8),
        "scale": scale.astype(dtypes["scale"]),
    }


def decode(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Log-confidences, float32 [steps, safety ids]."""
    stored = arrays["log_confidence"]
    if "scale" not in arrays:
        return stored.astype(np.float32)
    values = _SQUARES.take(stored)
    values *= -np.maximum(arrays["scale"].astype(np.float32), 1e-12)[:, None]
    return values

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
_SHARES = (np.arange(256, dtype=np.float32) / _LEVELS) ** 2
_SHARES[_MINUS_INFINITY] = np.inf
_BOUNDS = (np.arange(256, dtype=np.float32) / 16) ** 2


def step_records(stored_dtype: StoredDtype, ids: int) -> dict[str, np.dtype]:
    """The arrays of an encoding and what each holds of one step, little-endian.

    `log_confidence` is [steps, safety ids]; `bounds`, beside uint8 only, is [steps, 2]; `label` is
    [steps], float32 beside exact values, else float16.
    """
    records = {"log_confidence": np.dtype((np.dtype(stored_dtype).newbyteorder("<"), (ids,)))}
    if stored_dtype == "uint8":
        records["bounds"] = np.dtype((np.uint8, (2,)))
    return {**records, "label": np.dtype("<f4" if stored_dtype == "float32" else "<f2")}


def encode_labels(labels: np.ndarray, stored_dtype: StoredDtype) -> np.ndarray:
    """Log-probabilities of the response's own tokens as they are stored, [steps]."""
    return labels.astype(step_records(stored_dtype, 1)["label"])


def encode(log_confidences: np.ndarray, stored_dtype: StoredDtype) -> dict[str, np.ndarray]:
    """Log-confidences as they are stored.

    uint8: a step's magnitudes m (minus the log-confidences) lie between two bounds, (b / 16)^2
    each, and code c stands for m = near + (c / 254)^2 * (far - near); code 255 is minus infinity.
    The squares put the fine levels where confidence is. Magnitudes end at 254: e^-254 is nothing.

    Args:
        log_confidences: float [steps, safety ids], at most 0 up to rounding.
        stored_dtype: which encoding.

    Returns:
        the arrays of `step_records`, but for `label`.
    """
    if stored_dtype != "uint8":
        dtype = np.dtype(stored_dtype).newbyteorder("<")
        return {"log_confidence": log_confidences.astype(dtype)}
    magnitude = np.clip(-log_confidences.astype(np.float32), 0, None)
    is_finite = np.isfinite(magnitude)
    magnitude = np.minimum(magnitude, _BOUNDS[-1])
    least = magnitude.min(axis=1, where=is_finite, initial=_BOUNDS[-1])
    most = magnitude.max(axis=1, where=is_finite, initial=0)
    bounds = np.stack(
        [
            np.searchsorted(_BOUNDS, least, side="right") - 1,
            np.minimum(np.searchsorted(_BOUNDS, most, side="left"), 255),
        ],
        axis=1,
    ).astype(np.uint8)
    near, far = (_BOUNDS[bounds[:, i], None] for i in (0, 1))
    shares = (magnitude - near) / np.maximum(far - near, 1e-6)
    codes = np.rint(np.sqrt(np.clip(shares, 0, 1)) * _LEVELS)
    codes[~is_finite] = _MINUS_INFINITY
    return {"log_confidence": codes.astype(np.uint8), "bounds": bounds}


def decode(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Log-confidences, float32 [steps, safety ids]."""
    stored = arrays["log_confidence"]
    if "bounds" not in arrays:
        return stored.astype(np.float32)
    near, far = (_BOUNDS.take(arrays["bounds"][:, i])[:, None] for i in (0, 1))
    values = _SHARES.take(stored)
    values *= np.maximum(far - near, 1e-6)
    values += near
    return np.negative(values, out=values)

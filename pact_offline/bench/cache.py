"""The cache: bytes a response step by encoding, what that does to the loss, and reading speed."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from pact_offline.cache.encoding import StoredDtype, decode, encode
from pact_offline.cache.identity import Identity, store_path
from pact_offline.cache.row_keys import RowKeys
from pact_offline.cache.store import Store
from pact_offline.cache.targets import Binding, TargetCache
from pact_offline.cache.writer import StoreWriter
from pact_offline.errors import InputError
from pact_offline.machine import peak_resident_mib
from pact_offline.progress import bar
from pact_offline.rows.contexts import Context

if TYPE_CHECKING:
    import torch

CONTEXT_BYTES = 21  # of the table: a key of 16, the kind and the steps
_READ_STEPS = 16
_IDS = 50


@dataclass(frozen=True)
class EncodingSize:
    """One way to store a dataset's targets.

    Attributes:
        encoding: of the values.
        compression: codec, filter and level; "plain" is what a store does.
        chunk_steps: steps of a chunk.
        bytes_per_step: both contexts and their table entries, over the dataset's response steps.
        pact_change, confidence_change: relative change of the mean loss.
        contexts_per_second: read at random by one process, each from its own chunk.
    """

    encoding: str
    compression: str
    chunk_steps: int
    bytes_per_step: float
    pact_change: float
    confidence_change: float
    contexts_per_second: float


def _as_bfloat16(values: np.ndarray) -> dict[str, np.ndarray]:
    bits = values.astype("<f4").view("<u4")
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return {"log_confidence": (rounded >> 16).astype("<u2")}


def _from_bfloat16(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return (arrays["log_confidence"].astype("<u4") << 16).view("<f4")


def _as_linear(values: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.maximum(-values.min(axis=1, keepdims=True), 1e-6).astype("<f2")
    shares = -values / scale.astype(np.float32)
    return {
        "log_confidence": np.rint(shares.clip(0, 1) * 255).astype(np.uint8),
        "scale": scale,
    }


def _from_linear(arrays: dict[str, np.ndarray]) -> np.ndarray:
    scale = arrays["scale"].astype(np.float32)
    return np.asarray(-arrays["log_confidence"].astype(np.float32) / 255 * scale)


class _Encoding(NamedTuple):
    encode: Callable[[np.ndarray], dict[str, np.ndarray]]
    decode: Callable[[dict[str, np.ndarray]], np.ndarray]

    def round_trip(self, values: np.ndarray) -> np.ndarray:
        return self.decode(self.encode(values))


_ENCODINGS: dict[str, _Encoding] = {
    **{
        name: _Encoding(partial(encode, stored_dtype=name), decode)
        for name in get_args(StoredDtype)
    },
    "bfloat16": _Encoding(_as_bfloat16, _from_bfloat16),
    "uint8, even levels from 0": _Encoding(_as_linear, _from_linear),
}


# What a row of the table is called, zstd level, Blosc's shuffle, steps a chunk.
_COMPRESSIONS = [
    ("plain", 0, 0, 4096),
    ("zstd-1, bit shuffle", 1, 2, 4096),
    ("zstd-5", 5, 0, 4096),
    ("zstd-5, byte shuffle", 5, 1, 4096),
    ("zstd-5, bit shuffle", 5, 2, 4096),
    ("zstd-5, bit shuffle", 5, 2, 64),
    ("zstd-9, bit shuffle", 9, 2, 4096),
]


def measure_encodings(
    targets: TargetCache, policy: TargetCache, weights: torch.Tensor
) -> list[EncodingSize]:
    """Sizes and loss changes of every encoding, on a dataset that was scored exactly.

    Args:
        targets: of the reference, stored as float32.
        policy: of another model for the same rows, in place of a policy in training.
        weights: safety-token weights.

    Raises:
        InputError: the targets are not exact, the two are not of the same rows, or numcodecs is not
            installed.
    """
    _blosc()
    if targets.binding.identity.stored_dtype != "float32":
        raise InputError(f"{targets.path}: expected targets stored as float32, found others")
    if targets.binding.keys.first_difference(policy.binding.keys) is not None:
        raise InputError(f"{policy.path}: expected the rows of {targets.path}, found others")
    distinct, contexts = _distinct(targets)
    steps = sum(len(targets[row].full) for row in range(len(targets)))
    exact = _losses(targets, policy, weights, lambda values: values)
    found = []
    for name, encoding in _ENCODINGS.items():
        losses = _losses(targets, policy, weights, encoding.round_trip)
        changes = [abs(one / other - 1) for one, other in zip(losses, exact, strict=True)]
        arrays = encoding.encode(distinct)
        for compression, level, shuffle, chunk in _COMPRESSIONS:
            size, rate = _store(arrays, level, shuffle, chunk)
            labels = len(distinct) * (4 if name == "float32" else 2)
            per_step = (size + labels + CONTEXT_BYTES * contexts) / steps
            found.append(
                EncodingSize(name, compression, chunk, per_step, changes[0], changes[1], rate)
            )
    return found


def _distinct(targets: TargetCache) -> tuple[np.ndarray, int]:
    """The values of every distinct context, as a store holds them, and how many contexts."""
    distinct = targets.binding.keys.keys.unique()
    return targets.read_contexts(distinct), len(distinct)


def _losses(
    targets: TargetCache,
    policy: TargetCache,
    weights: torch.Tensor,
    change: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, float]:
    """Mean `pact` and `confidence` over all response steps, of changed targets."""
    import torch

    from pact_offline.objectives.confidence import confidence
    from pact_offline.objectives.pact import pact

    rows = list(range(len(targets)))
    ours = torch.from_numpy(policy.read(rows, "full"))
    full = torch.from_numpy(change(targets.read(rows, "full")))
    only = torch.from_numpy(change(targets.read(rows, "response_only")))
    # Steps as of one answer a row: what a later turn counts from 0 changes little here.
    steps = torch.cat([torch.arange(len(targets[row].full)) for row in rows])
    return (
        float(pact(ours, full, only, weights, steps).double().mean()),
        float(confidence(ours, full, None, weights, steps).double().mean()),
    )


def _blosc() -> Any:
    try:
        from numcodecs import Blosc
    except ImportError:
        raise InputError(
            "bench cache --targets: expected the package numcodecs, found none; install "
            "pact-offline[bench]"
        ) from None
    return Blosc


def _store(
    arrays: dict[str, np.ndarray], level: int, shuffle: int, chunk: int
) -> tuple[int, float]:
    """Bytes, and contexts a second read at random from chunks kept in memory."""
    blosc, total, chunks = _blosc(), 0, []
    for array in arrays.values():
        codec = blosc("zstd", clevel=level, shuffle=shuffle, blocksize=0)
        parts = [
            np.ascontiguousarray(array[first : first + chunk])
            for first in range(0, len(array), chunk)
        ]
        kept = [codec.encode(part) if level else part.tobytes() for part in parts]
        total += sum(map(len, kept))
        chunks.append((codec, kept, array.dtype, array.shape[1:]))
    random = np.random.default_rng(0)
    length = min(len(a) for a in arrays.values())
    reads, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        first = int(random.integers(length))
        for codec, kept, dtype, shape in chunks:
            data = kept[first // chunk]
            rows = codec.decode(data) if level else data
            width = dtype.itemsize * int(np.prod(shape))
            start = first % chunk * width
            np.frombuffer(rows[start : start + _READ_STEPS * width], dtype)
        reads += 1
    return total, reads / (time.perf_counter() - started)


@dataclass(frozen=True)
class Reading:
    """How a large store is read by one process.

    Attributes:
        stored_dtype: its encoding.
        steps, contexts: its size; `_READ_STEPS` steps a context, `_IDS` ids a step.
        gigabytes: on disk.
        write_steps_per_second: made by one writer.
        open_seconds: opening the store.
        open_targets_seconds: opening a targets.json for all of it.
        verify_seconds: checking every byte.
        contexts_per_second: read at random in batches of eight, after that check.
        peak_memory_mib: resident, of the process that reads.
    """

    stored_dtype: str
    steps: int
    contexts: int
    gigabytes: float
    write_steps_per_second: float
    open_seconds: float
    open_targets_seconds: float
    verify_seconds: float
    contexts_per_second: float
    peak_memory_mib: float


def measure_reading(stored_dtype: StoredDtype, steps: int) -> Reading:
    """Make a store of random values in a scratch folder; another process reads it at random."""
    identity = Identity(
        {"hub": "bench/bench", "commit": "0"},
        tuple(range(_IDS)), (0,), "bench", "float32", stored_dtype,
    )  # fmt: skip
    count = steps // _READ_STEPS // 2 * 2
    values = -20 * np.random.default_rng(0).random((_READ_STEPS, _IDS), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        place, keys = store_path(scratch, "bench", identity), []
        started = time.perf_counter()
        with (
            StoreWriter(place, identity, 131072, {}) as writer,
            bar(f"writing {stored_dtype}", count, "contexts") as progress,
        ):
            for number in range(count):
                ids = np.full(_READ_STEPS + 1, number, dtype=np.int32)
                context = Context("full", ids, ((1, len(ids)),))
                keys.append(context.key)
                writer.add(context, values, values[:, 0])
                progress.update(1)
        written = time.perf_counter() - started
        pairs = RowKeys.of([*map(list, zip(keys[::2], keys[1::2], strict=True))])
        path, shards = Path(scratch, "targets.json"), tuple(writer.shards)
        Binding(place, identity, "", "", {}, pairs, shards, (), {}).save(path)
        size = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            read = other.submit(_read_all, place, path).result()
    made = count * _READ_STEPS
    return Reading(stored_dtype, made, count, size / 1e9, made / written, *read)


class _Read(NamedTuple):
    open_seconds: float
    open_targets_seconds: float
    verify_seconds: float
    contexts_per_second: float
    peak_memory_mib: float


def _read_all(place: str, path: Path) -> _Read:
    times = [time.perf_counter()]
    store = Store(place)
    times.append(time.perf_counter())
    TargetCache.open(path)
    times.append(time.perf_counter())
    store.verify()
    order = np.random.default_rng(1).permutation(len(store))
    times.append(time.perf_counter())
    for first in range(0, len(order), 8):
        store.read(order[first : first + 8])
    times.append(time.perf_counter())
    opened, bound, verified, read = np.diff(times).tolist()
    return _Read(opened, bound, verified, len(order) / read, peak_resident_mib())


def size_table(found: list[EncodingSize]) -> str:
    """Markdown rows of the encodings."""
    lines = [
        "| encoding | compression | steps a chunk | bytes a step | `pact` changes by "
        "| `confidence` changes by | contexts/s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.encoding} | {one.compression} | {one.chunk_steps} | {one.bytes_per_step:.1f} "
        f"| {one.pact_change:.0e} | {one.confidence_change:.0e} "
        f"| {one.contexts_per_second:,.0f} |"
        for one in found
    ]
    return "\n".join(lines)


def reading_table(found: list[Reading]) -> str:
    """Markdown rows of the reading speeds."""
    lines = [
        "| encoding | steps | GB | written, steps/s | open store | open targets.json "
        "| check all bytes | contexts/s at random | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.stored_dtype} | {one.steps:,} | {one.gigabytes:.2f} "
        f"| {one.write_steps_per_second:,.0f} | {one.open_seconds:.2f} s "
        f"| {one.open_targets_seconds:.2f} s | {one.verify_seconds:.2f} s "
        f"| {one.contexts_per_second:,.0f} | {one.peak_memory_mib:.0f} MiB |"
        for one in found
    ]
    return "\n".join(lines)

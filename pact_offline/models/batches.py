"""Cutting work into batches by a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def batches(
    order: Iterable[int], sizes: Sequence[tuple[int, int]], limit: int, *, padded: bool = True
) -> Iterator[list[int]]:
    """Yield indices in their order, in lists of at most `limit` tokens each.

    Args:
        order: indices into `sizes`.
        sizes: tokens before and within each response.
        limit: tokens of a batch; one that is larger by itself is a batch of its own.
        padded: count what `aligned_batch` pads both sides to; else the tokens themselves.
    """
    batch: list[int] = []
    left = right = held = 0
    for index in order:
        before, within = sizes[index]
        wider = max(left, before) + max(right, within)
        count = wider * (len(batch) + 1) if padded else held + before + within
        if batch and count > limit:
            yield batch
            batch, left, right, held = [], 0, 0, 0
        batch.append(index)
        left, right, held = max(left, before), max(right, within), held + before + within
    if batch:
        yield batch

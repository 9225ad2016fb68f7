"""Evaluations that stand beside a report's own, and are not counted among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pact_offline.evaluation.metrics import Metrics


@dataclass(frozen=True)
class Otherwise:
    """An evaluation from elsewhere, how far it may be held beside the others, and its file."""

    metrics: Metrics
    note: str
    source: str


def read_otherwise(paths: Sequence[Path], models: Sequence[Metrics]) -> list[Otherwise]:
    """Read evaluations that need not be made as the report's were, nor have names of their own.

    Args:
        paths: of their metrics.json.
        models: the report's own; what differs is told against the reference, or else the first.

    Raises:
        MissingFileError: no such file.
        InputError: no metrics.json.
    """
    own = next((m for m in models if m.is_reference), models[0])
    found = [(path, Metrics.load(path, or_earlier=True)) for path in paths]
    return [Otherwise(metrics, _note(own, metrics), str(path)) for path, metrics in found]


def _note(own: Metrics, other: Metrics) -> str:
    if not other.answers_sha256:
        return "of an earlier version, which did not note what it was made from"
    difference = _difference(own, other)
    if difference is None:
        return "evaluated alike, as far as is known"
    return f"evaluated otherwise: {difference}"


def _difference(own: Metrics, other: Metrics) -> str | None:
    if difference := own.made_from.difference(other.made_from):
        return difference
    ours = own.answers_sha256 if own.is_reference else own.reference_sha256
    theirs = other.answers_sha256 if other.is_reference else other.reference_sha256
    if None not in (ours, theirs) and ours != theirs:
        return f"reference: expected answers of sha256 {ours:.12}, found {theirs:.12}"
    return None

"""Time and memory of the workflow's stages, from Snakemake's benchmark files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pact_offline.errors import InputError

_PIPELINE = ("demo_base", "demo_aligned", "tokens", "score", "finetune", "evaluate", "report")


@dataclass(frozen=True)
class StageCost:
    """What one stage took.

    Attributes:
        name: path of the benchmark file below its directory, without the suffix.
        seconds: wall-clock time; the mean where the file holds repeats.
        mebibytes: peak resident memory of the process tree; the highest of the repeats.
    """

    name: str
    seconds: float | None
    mebibytes: float | None


def read_stage_costs(directory: Path | None) -> list[StageCost]:
    """One entry a `*.tsv` below `directory`, in pipeline order; a bad value reads as None."""
    if directory is None or not directory.is_dir():
        return []
    try:
        costs = [_read(path, directory) for path in directory.rglob("*.tsv") if path.is_file()]
    except OSError as error:  # of a folder that goes while it is looked through, or is not ours
        raise InputError(f"{directory}: cannot be read: {error.strerror or error}") from None
    return sorted(costs, key=_pipeline_order)


def _pipeline_order(cost: StageCost) -> tuple[int, str]:
    stage = cost.name.split("/")[0]
    known = [n for n, name in enumerate(_PIPELINE) if stage == name or stage.startswith(f"{name}_")]
    return (known[0] if known else len(_PIPELINE), cost.name)


def _read(path: Path, directory: Path) -> StageCost:
    name = path.relative_to(directory).with_suffix("").as_posix()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    header, *rows = [line.split("\t") for line in lines] or [[]]
    seconds = _column(header, rows, "s")
    peaks = _column(header, rows, "max_rss")
    return StageCost(
        name,
        sum(seconds) / len(seconds) if seconds else None,
        max(peaks) if peaks else None,
    )


def _column(header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> list[float]:
    if name not in header:
        return []
    index = header.index(name)
    values = [_number(row[index]) for row in rows if len(row) > index]
    return [value for value in values if value is not None]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None

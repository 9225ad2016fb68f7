"""The results as files for a paper, a notebook or a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Mean, Metrics, Rate
from pact_offline.folders import output_aside, require_place
from pact_offline.report import numbers
from pact_offline.report.columns import Column, columns_of, further_columns, mean_columns
from pact_offline.report.otherwise import Otherwise

TABLES_MARK = "results.json"
FORMAT_VERSION = 1

_CSV_HEAD = [
    *["run", "rate", "title", "better", "count", "total", "value", "low", "high"],
    *["elsewhere", "from"],
]
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "^": r"\textasciicircum{}", "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "–": "--", "\u00a0": "~",
}  # fmt: skip


def require_tables_place(folder: Path, page: Path) -> None:
    """Refuse a place for tables that cannot be replaced as a whole.

    Raises:
        InputError: as of `require_place`, or the page would lie in it.
    """
    place = require_place(folder, TABLES_MARK)
    if place in page.resolve().parents:
        raise InputError(
            f"{folder}: expected a directory of the tables' own, found that of {page}; it is "
            "replaced as a whole"
        )


def write_tables(folder: Path, models: Sequence[Metrics], others: Sequence[Otherwise]) -> None:
    """Write results.csv, .md, .tex and .json: all of them, or none.

    Args:
        folder: of their own; earlier tables there are replaced.
        models: the reference and the runs, in the order of the rows.
        others: evaluations that were made otherwise, below them.

    Raises:
        InputError: the place is taken, or cannot be written to.
    """
    texts = {
        "csv": csv_text(models, others),
        "md": markdown_text(models, others),
        "tex": tex_text(models, others),
        "json": json_text(models, others),
    }
    with output_aside(folder, TABLES_MARK) as aside:
        for kind, text in texts.items():
            (aside / f"results.{kind}").write_bytes(text.encode("utf-8", "replace"))


def csv_text(models: Sequence[Metrics], others: Sequence[Otherwise]) -> str:
    """A line for every rate and mean of every model; numbers in full; a mean has no count."""
    columns = _columns(models, others)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for metrics, other in _rows(models, others):
        for column in columns:
            if (rate := _found(metrics, column)) is not None:
                count = rate.count if isinstance(rate, Rate) else ""
                writer.writerow(
                    [metrics.name, column.rate, column.title, column.better]
                    + [count, rate.total, rate.value, rate.low, rate.high]
                    + ([other.note, other.source] if other else ["", ""])
                )
    return text.getvalue()


def json_text(models: Sequence[Metrics], others: Sequence[Otherwise]) -> str:
    """The same as one object a model."""
    columns = _columns(models, others)

    def shown(metrics: Metrics, other: Otherwise | None) -> dict[str, Any]:
        return {
            "name": metrics.name,
            "is_reference": metrics.is_reference,
            "elsewhere": other and {"note": other.note, "from": other.source},
            "rates": {
                column.rate: {
                    "title": column.title,
                    "better": column.better,
                    **metrics.rates[column.rate].model_dump(),
                }
                for column in columns
                if column.rate in metrics.rates
            },
            "means": {name: mean.model_dump() for name, mean in metrics.means.items()},
        }

    runs = [shown(*row) for row in _rows(models, others)]
    return json.dumps({"format_version": FORMAT_VERSION, "runs": runs}, indent=1) + "\n"


def markdown_text(models: Sequence[Metrics], others: Sequence[Otherwise]) -> str:
    """A table a model a line: value, 95 % interval and count."""
    columns = _columns(models, others)
    lines = [
        ["Model", *(_heading(column) for column in columns)],
        ["---", *("---:" for _ in columns)],
    ]
    for metrics, other in _rows(models, others):
        lines.append([_label(metrics, other), *_cells(metrics, columns)])
    head, rule, *body = lines
    escaped = [[_escape_markdown(cell) for cell in line] for line in (head, *body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [escaped[0], rule, *escaped[1:]])


def tex_text(models: Sequence[Metrics], others: Sequence[Otherwise]) -> str:
    """A plain `tabular`, which needs no package."""
    columns = _columns(models, others)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_escape_tex, cells)) + r" \\" + "\n"

    text = f"\\begin{{tabular}}{{l{'r' * len(columns)}}}\n\\hline\n"
    text += line(["Model", *(_heading(column) for column in columns)]) + "\\hline\n"
    for metrics in models:
        text += line([metrics.name, *_cells(metrics, columns)])
    if others:
        text += "\\hline\n"
    for other in others:
        text += line([_label(other.metrics, other), *_cells(other.metrics, columns)])
    return text + "\\hline\n\\end{tabular}\n"


def _columns(models: Sequence[Metrics], others: Sequence[Otherwise]) -> list[Column]:
    elsewhere = [other.metrics for other in others]
    means = mean_columns([*models, *elsewhere])
    return [*columns_of(models, elsewhere), *further_columns(models, elsewhere), *means]


def _rows(
    models: Sequence[Metrics], others: Sequence[Otherwise]
) -> list[tuple[Metrics, Otherwise | None]]:
    return [*((m, None) for m in models), *((other.metrics, other) for other in others)]


def _heading(column: Column) -> str:
    return f"{column.title} ({column.better})" if column.better else column.title


def _label(metrics: Metrics, other: Otherwise | None) -> str:
    return f"{metrics.name} ({other.note})" if other else metrics.name


def _cells(metrics: Metrics, columns: Sequence[Column]) -> list[str]:
    return [_cell(_found(metrics, column)) for column in columns]


def _found(metrics: Metrics, column: Column) -> Rate | Mean | None:
    return metrics.rates.get(column.rate) or metrics.means.get(column.rate)


def _cell(rate: Rate | Mean | None) -> str:
    if rate is None:
        return numbers.MISSING
    if isinstance(rate, Mean):
        parts = [numbers.mean_interval(rate), f"mean of {rate.total}"]
        return f"{numbers.plain_number(rate.value)} ({'; '.join(filter(None, parts))})"
    return f"{numbers.percent(rate)} ({numbers.interval(rate)}; {rate.count}/{rate.total})"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", _on_one_line(text))


def _escape_tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in _on_one_line(text))


def _on_one_line(text: str) -> str:
    """Without line ends and other control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split(" "))

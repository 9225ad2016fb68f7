"""Plots as SVG that stands in the page, drawn by matplotlib.

Colours are custom properties of the page, so a plot follows it from light to dark and to paper.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from pact_offline.evaluation.metrics import Rate
from pact_offline.report.inline_svg import TITLE, inline
from pact_offline.report.styles import COLOURS, Style

# What matplotlib draws with, and what stands for it in the page. Black it would leave out.
_CODES = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(("text", "quiet", "line", "paper", *COLOURS), start=1)
}
_PROPERTIES = {code: f"var(--{name})" for name, code in _CODES.items()}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pact-offline",
    "text.parse_math": False,
    "text.color": _CODES["quiet"],
    "font.size": 12,
    "axes.labelcolor": _CODES["quiet"],
    "axes.labelsize": 13,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _CODES["line"],
    "grid.linewidth": 1,
    "lines.scale_dashes": False,
    "xtick.color": _CODES["quiet"],
    "ytick.color": _CODES["quiet"],
    "xtick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.size": 0,
}
# Where a name may stand from its dot, in px, and how much of it is left of there.
_PLACES = [
    *((11, 0, 0), (-11, 0, 1), (5, 17, 0), (5, -17, 0), (-5, 17, 1), (-5, -17, 1)),
    *((0, 17, 0.5), (0, -17, 0.5)),
]
_ALIGNMENTS = {0: "left", 0.5: "center", 1: "right"}


@dataclass(frozen=True)
class Point:
    """A dot with both its intervals, and what a pointer on it shows."""

    style: Style
    x: Rate
    y: Rate
    title: str
    is_faded: bool


@dataclass(frozen=True)
class Curve:
    """A line, and what a pointer on it shows; where a value is no number it has a gap."""

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    title: str

    @classmethod
    def along(cls, style: Style, values: Sequence[float], last: float, title: str) -> Curve:
        """Values in even steps from 0 to `last`; a single one is a level line."""
        level = values if len(values) > 1 else [*values, *values]
        return cls(style, np.linspace(0, last, len(level)).tolist(), level, title)


def ticks_around(low: float, high: float) -> list[float]:
    """Two to six round values that enclose `low` and a greater `high`."""
    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    return [round(float(tick), 12) for tick in locator.tick_values(low, high)]


def draw_points(
    points: Sequence[Point],
    size: tuple[int, int],
    *,
    ticks: Sequence[float],
    titles: tuple[str, str],
    label: str,
    letters: int,
) -> Markup:
    """Shares against shares, each dot with cross hairs and its name beside it.

    Args:
        points: of shares.
        size: of the plot in px.
        ticks: of the horizontal axis; the vertical one is from 0 to 1.
        titles: of the horizontal and the vertical axis.
        label: what the plot shows, for those who do not see it.
        letters: after which a name is cut.
    """
    with _figure(*size) as figure:
        axes = _axes(figure, left=44, right=22, top=44, bottom=52)
        axes.set(xlim=(ticks[0], ticks[-1]), xticks=ticks, ylim=(0, 1))
        axes.xaxis.set_major_formatter(_per_cent)
        axes.yaxis.set_major_formatter(_per_cent)
        axes.set_xlabel(titles[0], loc="right")
        figure.text(0, 1, titles[1], size=13, va="top")
        for point in sorted(points, key=lambda point: not point.is_faded):
            colour = _CODES["quiet" if point.is_faded else point.style.colour]
            drawn = axes.errorbar(
                [point.x.value],
                [point.y.value],
                xerr=_reach(point.x),
                yerr=_reach(point.y),
                **_dot(point.style, colour),
                ecolor=(colour, 0.5),
                elinewidth=1.25,
                clip_on=False,
            )
            for part in (drawn.lines[0], *drawn.lines[2]):
                part.set_gid(TITLE + _printable(point.title))
        _name(axes, sorted(points, key=lambda point: point.is_faded), letters)
        return _inline(figure, {"role": "img", "aria-label": _printable(label)})


def _reach(rate: Rate) -> list[list[float]]:
    """How far its interval reaches down and up; at 0 and 1 rounding would have it begin beyond."""
    return [[max(rate.value - rate.low, 0.0)], [max(rate.high - rate.value, 0.0)]]


def _name(axes: Axes, points: Sequence[Point], letters: int) -> None:
    """Write names where they cover nothing, and leave out those without such a place.

    The first points choose first, and a name that is not faded may cover dots that are.
    """
    area = axes.bbox.padded(8)
    room = Bbox.from_extents(area.x0, area.y0, axes.figure.bbox.x1, area.y1 + 18)
    dots = axes.transData.transform([(point.x.value, point.y.value) for point in points])
    boxes = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in dots]
    vivid = [box for box, point in zip(boxes, points, strict=True) if not point.is_faded]
    for point, (dot_x, dot_y) in zip(points, dots, strict=True):
        name = axes.annotate(
            _printable(point.style.name, letters),
            (point.x.value, point.y.value),
            textcoords="offset points",
            color=_CODES["quiet" if point.is_faded else point.style.colour],
            weight="bold",
            va="center",
        )
        width, best = name.get_window_extent().width, None
        fewest = 1 if point.is_faded else len(points)  # dots under the name, less than these
        for x, y, before in _PLACES:
            box = Bbox.from_bounds(dot_x + x - before * width, dot_y + y - 8, width, 16)
            inside = all(room.contains(*corner) for corner in box.corners())
            covered = box.count_overlaps(boxes)
            if inside and covered < fewest and not box.count_overlaps(vivid):
                best, fewest = (box, x, y, before), covered
        if best is None:
            name.remove()
        else:
            box, x, y, before = best
            name.set(position=(x, y), horizontalalignment=_ALIGNMENTS[before])
            vivid.append(box)


def draw_curves(
    curves: Sequence[Curve], ticks: Sequence[float], label: str, *, are_shares: bool, has_gap: bool
) -> Markup:
    """Lines over steps from 0.

    Args:
        curves: at least one.
        ticks: of the vertical axis, in its whole length.
        label: what the plot shows, for those who do not see it.
        are_shares: whether values read as per cent.
        has_gap: whether the area between the first and the last curve is shaded.
    """
    with _figure(300, 140) as figure:
        axes = _axes(figure, left=46, right=10, top=10, bottom=26)
        last = max(x for curve in curves for x in curve.x)
        axes.set(xlim=(0, last), ylim=(ticks[0], ticks[-1]), yticks=ticks)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(_per_cent if are_shares else StrMethodFormatter("{x:.3g}"))
        if has_gap:
            x, one, other = zip(
                *zip(curves[0].x, curves[0].y, curves[-1].y, strict=False), strict=True
            )
            shade = (_CODES[curves[-1].style.colour], 0.13)
            axes.fill_between(x, one, other, facecolor=shade, linewidth=0)
        for curve in curves:
            axes.plot(
                curve.x,
                curve.y,
                color=_CODES[curve.style.colour],
                dashes=curve.style.dashes or (None, None),
                linewidth=2,
                clip_on=False,
                path_effects=[withStroke(linewidth=12, alpha=0)],  # what a pointer can hit
                gid=TITLE + _printable(curve.title),
            )
        return _inline(figure, {"role": "img", "aria-label": _printable(label)})


@lru_cache(maxsize=256)
def draw_key(style: Style) -> Markup:
    """A stretch of the model's line with its dot."""
    colour, dashes = _CODES[style.colour], style.dashes or (None, None)
    with _figure(30, 16) as figure:
        line = Line2D([1 / 30, 29 / 30], [0.5, 0.5], color=colour, dashes=dashes, linewidth=2)
        figure.add_artist(line)
        figure.add_artist(Line2D([0.5], [0.5], **_dot(style, colour)))
        return _inline(figure, {"class": "key", "aria-hidden": "true"})


def _dot(style: Style, colour: str) -> dict[str, Any]:
    inner, outer = (_CODES["paper"], colour) if style.marker is None else (colour, _CODES["paper"])
    return {
        "marker": style.marker or "o",
        "markersize": 11,
        "color": colour,
        "markerfacecolor": inner,
        "markeredgecolor": outer,
        "markeredgewidth": 2.5 if style.marker is None else 1.5,
    }


def _per_cent(value: float, _: object = None) -> str:
    return f"{100 * value:g} %"


@contextmanager
def _figure(width: int, height: int) -> Iterator[Figure]:
    """A figure of so many px, whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # Of letters that its font lacks: the reader's browser has others.
        warnings.simplefilter("ignore", UserWarning)
        yield Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)


def _axes(figure: Figure, *, left: int, right: int, top: int, bottom: int) -> Axes:
    """Axes within margins of so many px."""
    width, height = figure.bbox.width, figure.bbox.height
    area = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure.add_axes(area, frameon=False)


def _inline(figure: Figure, attributes: Mapping[str, str]) -> Markup:
    file = io.StringIO()
    undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=undated)
    return inline(file.getvalue(), _PROPERTIES, attributes)


def _printable(text: str, letters: int | None = None) -> str:
    """Text on one line without what no SVG can hold, cut after so many letters."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if letters is None or len(plain) <= letters else f"{plain[: letters - 1]}…"

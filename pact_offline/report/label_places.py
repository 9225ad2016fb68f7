"""Where the labels of dots stand, so that they cover little of each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

_NARROW, _WIDE, _HEIGHT = 290, 820, 384  # px of the plot area on a phone and on a desk
_CHARACTER, _LINE = 7.5, 15  # px of a label
_HEADROOM = 36  # px above the plot area that labels may use


class Label(NamedTuple):
    """Where a label stands from its dot, in px, and which of its ends (`start`, `end`) is there."""

    x: int
    y: int
    anchor: str

    @property
    def is_far(self) -> bool:
        """Whether it needs a line to its dot."""
        return not -20 < self.y < 30


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


_PLACES = tuple(
    Label(x, y, anchor)
    for y, (x, anchor) in product(
        (-9, 18, -25, 34, -41, 50, -57, 66, 82, 98), ((9, "start"), (-9, "end"))
    )
)


def place_labels(names: Sequence[str], dots: Sequence[tuple[float, float]]) -> list[Label]:
    """For each dot the nearest label that covers least, on a phone and on a desk together."""
    taken = {
        width: [_box(dot, width, -7, -7, 14, 14) for dot in dots] for width in (_NARROW, _WIDE)
    }
    chosen = []
    for name, dot in zip(names, dots, strict=True):
        places = [{w: _label_box(name, dot, label, w) for w in taken} for label in _PLACES]
        costs = [sum(_covered(boxes[w], taken[w], w) for w in taken) for boxes in places]
        best = costs.index(min(costs))
        for width, box in places[best].items():
            taken[width].append(box)
        chosen.append(_PLACES[best])
    return chosen


def _box(
    dot: tuple[float, float], plot_width: int, dx: float, dy: float, width: float, height: float
) -> Box:
    left, top = dot[0] * plot_width / 100 + dx, dot[1] * _HEIGHT / 100 + dy
    return Box(left, top, left + width, top + height)


def _label_box(name: str, dot: tuple[float, float], label: Label, plot_width: int) -> Box:
    width = len(name) * _CHARACTER
    left = label.x if label.anchor == "start" else label.x - width
    return _box(dot, plot_width, left, label.y - 12, width, _LINE)


def _covered(box: Box, taken: Sequence[Box], plot_width: int) -> float:
    """Area of a label over what is there, and beyond the plot."""
    beyond = (-box.left, box.right - plot_width, -_HEADROOM - box.top, box.bottom - _HEIGHT)
    return _LINE * sum(max(0.0, edge) for edge in beyond) + sum(
        max(0.0, min(box.right, other.right) - max(box.left, other.left))
        * max(0.0, min(box.bottom, other.bottom) - max(box.top, other.top))
        for other in taken
    )

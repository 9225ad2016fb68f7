"""How each model looks, the same everywhere on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pact_offline.evaluation.metrics import Metrics

# No two of the three counts share a factor that would let looks repeat within 30 runs.
COLOURS = ("c0", "c1", "c2", "c3", "c4")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))


@dataclass(frozen=True)
class Style:
    """Name and look of a model.

    Attributes:
        name: of the model.
        colour: a custom property of the page's style sheet, without its dashes.
        marker: of its dots, by matplotlib's name; None for the reference, whose dot is hollow.
        dashes: of its lines, on and off in px; none for a solid line.
    """

    name: str
    colour: str = "text"
    marker: str | None = None
    dashes: tuple[int, ...] = ()


def styles_of(models: Sequence[Metrics]) -> dict[str, Style]:
    """A look for every model by name: the reference in the text's colour, runs in given order."""
    styles = {m.name: Style(m.name) for m in models if m.is_reference}
    for n, run in enumerate(m for m in models if not m.is_reference):
        look = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)], DASHES[n % len(DASHES)]
        styles.setdefault(run.name, Style(run.name, *look))
    return styles


def reference_style(styles: dict[str, Style]) -> Style:
    """The reference's look, also where only runs were evaluated."""
    return next((one for one in styles.values() if one.marker is None), Style("reference"))

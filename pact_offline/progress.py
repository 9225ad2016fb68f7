"""Progress bars on stderr: done, rate and time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(what: str, total: int | None, unit: str, *, shown: bool = True) -> tqdm[Any]:
    """A bar for a person; in a log file, a line every ten seconds. None: no end is known."""
    person = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=total is None or total > 9999,
        mininterval=0.2 if person else 10,
        dynamic_ncols=person,
        leave=True,
        disable=not shown,
    )

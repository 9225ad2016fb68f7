"""Runs of a config, expanded: one for each combination of swept values, and for each seed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pact_offline.settings.stages import ObjectiveSettings

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# What means nothing where nothing is held.
_OF_AN_OBJECTIVE = {
    *ObjectiveSettings.model_fields,
    *("rehearsal_share", "rehearsal_weight", "gap_warns", "gap_stops"),
}
_IDLE = _OF_AN_OBJECTIVE - {"objective"}


def expand(
    runs: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """Settings of every run to train, by name.

    A run takes each combination of the swept values and each seed; a key that it sets itself it
    keeps, and is not expanded along. One whose objective is none is not expanded along what only
    an objective reads. A name is the run's as written, then each swept key and its value in
    alphabetical order of the keys, then the seed: neither the order of keys nor more values or
    seeds change the name of a run that was there.

    Args:
        runs: as written, without `training`.
        training: what all runs share; a swept value stands before it.
        sweep: values by training setting, checked.
        seeds: none: the runs' own.

    Raises:
        ValueError: in one line: two runs of one name, a name that none may have, or no run to
            expand along a key.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    used: set[str] = set()
    for written, own in runs.items():
        axes = {key: sweep[key] for key in sorted(sweep) if key not in own}
        if seeds and "seed" not in own:
            axes["seed"] = seeds
        for chosen in product(*axes.values()):
            swept = dict(zip(axes, chosen, strict=True))
            if {**training, **own, **swept}.get("objective") == "none":
                swept = {key: value for key, value in swept.items() if key not in _IDLE}
            used |= set(swept)
            name = "-".join([written, *(f"{key}-{_named(v)}" for key, v in swept.items())])
            if not re.match(RUN_NAME, name):
                raise ValueError(
                    f"runs.{written}: expected a name of at most 64 characters with its swept "
                    f"values, found {name}; shorten the run's"
                )
            made = written, {**own, **swept}
            if found.setdefault(name, made) != made:
                raise ValueError(
                    f"runs.{written}: expected a name that no other run has, found {name} twice"
                )
    for key in sorted({*sweep, *(["seed"] if seeds else [])} - used):
        place = "seeds" if key == "seed" else f"sweep: {key}"
        idle = ", or has no objective" if key in _IDLE else ""
        raise ValueError(
            f"{place}: expected a run to expand, found none: each sets {key} itself{idle}"
        )
    return {name: settings for name, (_, settings) in found.items()}


def _named(value: Any) -> str:
    """A value as part of a name; of a path its last part, so that it is the same from anywhere."""
    if isinstance(value, float):
        short = f"{value:g}"
        text = (short if float(short) == value else repr(value)).replace("+", "")
    elif isinstance(value, tuple):
        text = "-".join(map(_named, value))
    elif isinstance(value, str):
        text = value.rpartition("/")[2]
    else:
        text = json.dumps(value, sort_keys=True)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "empty"

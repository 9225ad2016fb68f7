"""A gauge of a run's safety while it trains: how far held and rehearsed steps have moved."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from transformers import TrainerCallback

from pact_offline.errors import TrainingError

log = logging.getLogger(__name__)

_STEPS = 20  # one batch holds a few such rows, and says little by itself


class Gauge(TrainerCallback):  # type: ignore[misc]
    """Warns, or ends the training, where the mean `held_gap` of the last steps is too large."""

    def __init__(self, warns: float | None, stops: float | None) -> None:
        self._warns, self._stops = warns, stops
        self._is_set = warns is not None or stops is not None
        self._last: deque[float] = deque(maxlen=_STEPS)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on from a checkpoint has the steps before it too."""
        found = [entry["held_gap"] for entry in state.log_history if "held_gap" in entry]
        self._last.extend(found)
        if self._is_set and state.is_world_process_zero and state.max_steps < _STEPS:
            log.warning(
                "--gap-warns and --gap-stops look at the mean over %d steps, and this run has %d",
                _STEPS,
                state.max_steps,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say so where too few steps had a held or rehearsed row to look at."""
        found = len(self._last)
        if self._is_set and state.is_world_process_zero and found < _STEPS <= state.max_steps:
            log.warning(
                "--gap-warns and --gap-stops looked at nothing: held or rehearsed rows were in %d "
                "of %d steps, and the mean is over %d",
                found,
                state.max_steps,
                _STEPS,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "held_gap" not in logs:
            return
        self._last.append(logs["held_gap"])
        if len(self._last) < _STEPS:
            return
        mean = sum(self._last) / _STEPS
        said = f"step {state.global_step}: the confidence gap of held and rehearsed steps"
        if self._stops is not None and mean > self._stops:
            raise TrainingError(
                f"{said}: expected at most {self._stops:g} (--gap-stops), found {mean:.3g}"
            )
        if self._warns is not None and mean > self._warns:
            if state.is_world_process_zero:
                log.warning("%s is above %g (--gap-warns): %.3g", said, self._warns, mean)
            self._warns = None  # once a run

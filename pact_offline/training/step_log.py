"""What a person sees of a training: a progress bar, and a log of every step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pact_offline.errors import TrainingError
from pact_offline.progress import bar

STEP_LOG = "training.jsonl"


class Journal(TrainerCallback):  # type: ignore[misc]
    """A progress bar on stderr, and one JSON line a step in `training.jsonl`.

    Of several processes, the first writes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        self._bar = bar("training", 0, "steps", shown=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._is_first = state.is_world_process_zero
        if self._is_first:
            self._started = time.monotonic() - self._keep(state.global_step)
        self._bar = bar("training", state.max_steps, "steps", shown=self._is_first)
        self._bar.update(state.global_step)

    def _keep(self, step: int) -> float:
        """Drop lines after the step that a run goes on from; give the seconds spent by then."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in map(json.loads, lines[:step]) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return float(kept[-1]["seconds"]) if kept else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not all(map(_is_finite, logs.values())):
            raise TrainingError(
                f"step {state.global_step}: expected a finite loss and gradient, found "
                f"loss {logs['loss']}; lower --learning-rate or --kl-weight"
            )
        if not self._is_first:
            return
        seconds = round(time.monotonic() - self._started, 3)
        line = {"step": state.global_step, "seconds": seconds, **logs}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown: dict[str, object] = {
            name: f"{logs[name]:.3g}" for name in ("cross_entropy", "kl") if name in logs
        }
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """End the bar's line, however training ended."""
        self._bar.close()


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")

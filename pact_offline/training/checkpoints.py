"""Checkpoints: a run goes on where it was killed, with the same batches in the same order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pact_offline.files import write_json
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.settings.stages import FinetuneSettings

log = logging.getLogger(__name__)

_RUN = "run.json"
_EPOCH = "epoch_start.safetensors"  # written last: a checkpoint without it is not whole


def fingerprint(
    settings: FinetuneSettings,
    model: dict[str, str],
    targets: str | None,
    examples: Sequence[TokenizedExample],
) -> str:
    """What decides a run's result: settings, model, store and rows; 64 hex digits."""
    digest = hashlib.sha256()
    values = settings.model_dump(mode="json", exclude={"save_steps", "report_to"})
    processes = os.environ.get("WORLD_SIZE", "1")  # it decides what a step is
    digest.update(json.dumps([values, model, targets, processes], sort_keys=True).encode())
    for example in examples:
        digest.update(f"{example.response_start} {len(example.ids)} ".encode())
        digest.update(example.ids.astype("<i4").tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one output directory, in a hidden folder beside it."""

    def __init__(self, output: Path, run: str) -> None:
        """Name the folder.

        Args:
            output: where the adapter will be.
            run: fingerprint of the run.
        """
        self.folder, self._run = output.with_name(f".{output.name}.checkpoints"), run

    def take_up(self) -> Path | None:
        """The last whole checkpoint of a killed run of the same fingerprint, if there is one.

        What a run of another fingerprint left is removed.
        """
        known = self._known()
        if known != self._run:
            if known is not None:
                log.info("%s: of a run with other settings or rows; starting over", self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(self.folder / _RUN, {"fingerprint": self._run})
        whole = [path.parent for path in self.folder.glob(f"checkpoint-*/{_EPOCH}")]
        if not whole:
            return None
        latest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
        log.info("%s: going on from here", latest)
        return latest

    def _known(self) -> str | None:
        try:
            return str(json.loads((self.folder / _RUN).read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self) -> None:
        """Remove them all: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


class EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Makes a resumed epoch draw the same order of rows.

    The Trainer restores the random state of the checkpoint's step, but draws the order of the epoch
    before that. So the state at the epoch's start is kept too.
    """

    def __init__(self, resumed: Path | None) -> None:
        self._restored = load_file(resumed / _EPOCH)["rng"] if resumed else None
        self._start = torch.get_rng_state()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if self._restored is not None:
            torch.set_rng_state(self._restored)
            self._restored = None
        self._start = torch.get_rng_state()

    def on_save(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_file({"rng": self._start}, folder / _EPOCH)

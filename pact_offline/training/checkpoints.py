"""Checkpoints: a run goes on where it was killed, with the same batches in the same order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from pact_offline.errors import InputError, Interrupted
from pact_offline.own_code import content_of
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.step_log import STEP_LOG

log = logging.getLogger(__name__)

_MEANS = {
    *("save_steps", "report_to", "gap_warns", "gap_stops"),
    *("evaluate_steps", "evaluate_prompts", "evaluate_tokens"),
}  # decide no weight
_LOCK = "training"  # of one output's checkpoints
_EPOCH = "epoch_start.safetensors"  # written last: a checkpoint without it is not whole


def fingerprint(
    settings: FinetuneSettings,
    model: dict[str, str],
    targets: str | None,
    rows: str,
    tokens: str | None = None,
    rehearsal: str | None = None,
) -> str:
    """What decides a run's result; 64 hex digits.

    Args:
        settings: with the content of an objective of the user's own.
        model: its identity.
        targets: digest of their store's identity; None without a cache.
        rows: `TokenizedRows.digest`.
        tokens: digest of the safety tokens; None with objective "none".
        rehearsal: digest of the rehearsed rows and their store; None without.
    """
    digest = hashlib.sha256()
    values = settings.model_dump(mode="json", exclude=_MEANS)
    own = content_of("objective", settings.objective)
    processes = os.environ.get("WORLD_SIZE", "1")  # it decides what a step is
    parts = [values, model, targets, processes, tokens, own, rows, rehearsal]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def _folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.checkpoints")


class Checkpoints:
    """The checkpoints of one run, beside those of other runs of the same output directory."""

    def __init__(self, output: Path, run: str) -> None:
        """Name the folder, in a hidden one beside the output.

        Args:
            output: where the adapter will be.
            run: fingerprint of the run.
        """
        self._output, self.folder = output, _folder_of(output) / run[:12]

    def latest(self) -> Path | None:
        """The last whole checkpoint, if there is one."""
        whole = [path.parent for path in self.folder.glob(f"checkpoint-*/{_EPOCH}")]
        return max(whole, key=step_of) if whole else None

    def tell(self) -> None:
        """Log where the run goes on from, and which runs of other settings or rows were killed."""
        if latest := self.latest():
            log.info("%s: going on from here", latest)
        tell_of_killed_runs(self._output, besides=self.folder)

    def kept(self) -> str | None:
        """Where a run that is stopped now stands, and where it goes on; None: nothing is kept."""
        latest = self.latest()
        if latest is None:
            return None
        steps = (self.folder / STEP_LOG).read_text(encoding="utf-8").count("\n")
        return f"interrupted at step {steps}; the same command goes on from step {step_of(latest)}"


@contextmanager
def checkpoints_held(output: Path, *, keeps: bool) -> Iterator[None]:
    """Hold the checkpoints of an output, for as long as a run of it lives; when it is done, remove
    them.

    Args:
        output: where the result will be.
        keeps: whether the run keeps checkpoints; another leaves those of a run that lives.

    Raises:
        InputError: another run has them.
    """
    if not keeps:
        yield
        if _folder_of(output).exists():
            with suppress(InputError), _locked(output):
                remove_checkpoints(output)
        return
    with _locked(output):
        yield
        remove_checkpoints(output)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    folder = _folder_of(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: expected checkpoints of no other run that trains now, found one; wait "
                "for it, or give this one an output of its own"
            ) from None
        except (ImportError, OSError):  # no such locks here
            pass
        yield


def require_space(output: Path, parameters: int, settings: FinetuneSettings) -> None:
    """Refuse a disk on which what is trained, and its checkpoints, would not fit.

    A checkpoint has the weights and AdamW's two averages of each; two are kept while a third is
    written.

    Args:
        output: where the result will be.
        parameters: how many are trained, four bytes each.
        settings: of the run.

    Raises:
        InputError: says what is needed and what is free.
    """
    needed = 4 * parameters * (1 + (9 if settings.save_steps else 0))
    folder = Path(os.path.realpath(output)).parent
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{output}: expected {needed / 1e6:,.2f} MB of free disk space for what is trained"
            f"{' and its checkpoints' if settings.save_steps else ''}, found {free / 1e6:,.2f} MB"
        )


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def tell_of_killed_runs(output: Path, besides: Path | None = None) -> None:
    """Log the checkpoints that killed runs of an output directory left."""
    whole = _folder_of(output).glob(f"*/checkpoint-*/{_EPOCH}")
    runs = sorted({path.parents[1] for path in whole} - {besides})
    if runs:
        log.info(
            "%s: holds checkpoints of killed runs of other settings or rows (%s); they stay until "
            "a run of %s is done",
            _folder_of(output),
            ", ".join(run.name for run in runs),
            output,
        )


def remove_checkpoints(output: Path) -> None:
    """Remove those of every run of an output directory: one is done."""
    folder = _folder_of(output)
    if folder.exists():
        for mark in folder.glob(f"*/checkpoint-*/{_EPOCH}"):
            mark.unlink(missing_ok=True)  # first: half a checkpoint is none
        shutil.rmtree(folder, ignore_errors=True)
        log.info("%s: removed, since %s is done", folder, output)


@contextmanager
def interruption_told(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Say of a run that is stopped from outside what is kept of it.

    Raises:
        Interrupted: on Ctrl-C. A `SystemExit` is logged and goes on.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        kept = checkpoints.kept() if checkpoints else None
        text = kept or "interrupted; nothing was kept (--save-steps N keeps checkpoints)"
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted(text) from None
        log.warning("%s", text)
        raise


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

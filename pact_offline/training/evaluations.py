"""Answers while a run trains: a few prompts, asked again and again, as the policy changes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from pact_offline.errors import SettingError

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


class Watch(Protocol):
    """What asks and judges.

    Attributes:
        digest: over all that decides its verdicts beside the policy.
    """

    @property
    def digest(self) -> str: ...

    def __call__(self, policy: Any) -> dict[str, Any]:
        """Ask a policy that is in eval mode; what was found, as JSON has it."""

    def describe(self, found: dict[str, Any]) -> str:
        """What was found, in a few words."""


class Evaluations(TrainerCallback):  # type: ignore[misc]
    """Asks at steps 0, N, 2N, ... and at the end; one JSON line each time in `evaluations.jsonl`.

    The weights come out as they would without it: nothing is drawn from the random state, and the
    policy is put back into training mode. Of several processes, the first asks and the others wait.
    """

    def __init__(
        self, path: Path, every: int, watch: Watch, leave_out: Callable[[float], object]
    ) -> None:
        """Args:
        path: of the file; lines of a run that was killed are kept as far as it goes on from them.
        every: so many optimizer steps, N.
        watch: asks and judges.
        leave_out: told the seconds of every asking, which are none of training.
        """
        self._path, self._every, self._watch, self._leave_out = path, every, watch, leave_out
        self._done: set[int] = set()
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        kept = []
        for line in text.splitlines():
            with suppress(ValueError):  # the last one may be half written
                entry = json.loads(line)
                if entry["step"] <= state.global_step and entry["of"] == self._watch.digest:
                    kept.append(entry)
        self._done = {entry["step"] for entry in kept}
        self._path.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        if state.global_step % self._every == 0:
            self._ask(args, state, about["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self._ask(args, state, about["model"])

    def _ask(self, args: Any, state: Any, policy: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero or step in self._done:
            return
        started = time.monotonic()
        found = ask(policy, self._watch, is_bfloat16=args.bf16)
        seconds = time.monotonic() - started
        line = {"step": step, "seconds": round(seconds, 3), "of": self._watch.digest, **found}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._done.add(step)
        self.seconds += seconds
        self._leave_out(seconds)
        log.info("step %d: %s (%.1f s)", step, self._watch.describe(found), seconds)


def ask(policy: Any, watch: Watch, *, is_bfloat16: bool) -> dict[str, Any]:
    """What a watch finds of a policy, which stays as it is, and the random state too.

    Args:
        policy: in either mode.
        watch: asks and judges.
        is_bfloat16: the policy computes in it, by autocast, as in training.
    """
    device, was_training = policy.device, policy.training
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16),
        torch.compiler.set_stance("force_eager"),  # lengths of answers would be compiled anew
    ):
        policy.eval()
        try:
            return watch(policy)
        finally:
            policy.train(was_training)


def require_whole_policy(is_sharded: bool) -> None:
    """Refuse to ask a policy of which every process holds a part."""
    if is_sharded:
        raise SettingError(
            "--evaluate-steps: expected a policy that every process holds whole, found one that is "
            "sharded (FSDP, DeepSpeed)"
        )

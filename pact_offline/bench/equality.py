"""Training from a cache against training with the reference model in memory: how far apart?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from pact_offline.cache.targets import TargetCache
from pact_offline.models.locate import ModelFiles
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.finetune import finetune
from pact_offline.training.policy import prepare_policy


class _Run(NamedTuple):
    losses: np.ndarray
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Equality:
    """How a training from a cache differs from the same one with a live reference.

    Attributes:
        objective: name of the regulariser.
        compute_dtype: of both trainings and of the live reference.
        cache: engine, compute dtype and stored dtype of the cache.
        steps: optimizer steps.
        loss_difference: largest difference of a step's loss, relative to that loss.
        weight_difference: largest difference of a trained weight at the end.
        weights_moved: largest change of a trained weight in the live training, for scale.
    """

    objective: str
    compute_dtype: str
    cache: str
    steps: int
    loss_difference: float
    weight_difference: float
    weights_moved: float


def equality(
    model: ModelFiles,
    sources: Sequence[str | Path],
    targets: Sequence[Path],
    tokens_path: Path,
    settings: FinetuneSettings,
    *,
    cache: str | None = None,
) -> list[Equality]:
    """Train once with a live reference and once from each cache, all else equal.

    Args:
        model: reference and start of the policy.
        sources: row files.
        targets: a targets.json for each cache.
        tokens_path: safety_tokens.json.
        settings: of every training; every row is learnt, as a live reference holds none.
        cache: as in `TargetCache.open`.
    """
    caches = [TargetCache.open(path, cache=cache) for path in targets]
    with tempfile.TemporaryDirectory() as scratch:

        def train(name: str, path: Path | None, **changes: object) -> _Run:
            output = Path(scratch) / name
            chosen = settings.model_copy(update={"refused_rows": "learn", **changes})
            finetune(
                model, sources, output, chosen,
                targets_path=path, tokens_path=tokens_path, cache_place=cache,
            )  # fmt: skip
            return _read(output)

        cached = [train(f"cache{i}", path, reference="cache") for i, path in enumerate(targets)]
        live = train("live", None, reference="live")
    moved = _largest_difference(live.weights, _untrained(str(model.path), settings))
    return [
        Equality(
            settings.objective,
            settings.dtype,
            f"{binding.identity.engine}, {binding.identity.compute_dtype}, "
            f"stored {binding.identity.stored_dtype}",
            len(live.losses),
            float(np.max(np.abs(run.losses - live.losses) / np.abs(live.losses))),
            _largest_difference(run.weights, live.weights),
            moved,
        )
        for run, binding in zip(cached, (c.binding for c in caches), strict=True)
    ]


def _read(output: Path) -> _Run:
    lines = (output / "training.jsonl").read_text(encoding="utf-8").splitlines()
    weights: dict[str, np.ndarray] = {}
    for file in sorted(output.glob("*.safetensors")):
        weights |= load_file(file)
    return _Run(np.array([json.loads(line)["loss"] for line in lines]), weights)


def _untrained(model: str, settings: FinetuneSettings) -> dict[str, np.ndarray]:
    policy = prepare_policy(model, settings)
    if settings.method == "lora":
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(policy)
    else:
        state = policy.state_dict()
    return {name: tensor.float().numpy(force=True) for name, tensor in state.items()}


def _largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.max(np.abs(one[name] - other[name]))) for name in one)


def table(found: Sequence[Equality]) -> str:
    """Markdown rows of the results."""
    lines = [
        "| objective | compute dtype | cache | steps | loss | weights | weights moved by |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{one.objective}` | {one.compute_dtype} | {one.cache} | {one.steps} "
        f"| {one.loss_difference:.1e} | {one.weight_difference:.1e} | {one.weights_moved:.1e} |"
        for one in found
    ]
    return "\n".join(lines)

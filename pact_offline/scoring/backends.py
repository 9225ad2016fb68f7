"""A scorer, and its device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pact_offline.scoring.scorer import Scorer
from pact_offline.settings.stages import ScoreSettings


def bind_device(part: tuple[int, int], tensor_parallel_size: int) -> str | None:
    """Give a part of the work GPUs of its own, where this process sees several.

    Sets CUDA_VISIBLE_DEVICES, within what it allowed before. Has to come before CUDA is used.

    Args:
        part: (i, n), the i-th of n parts; with fewer GPUs than parts, they take turns.
        tensor_parallel_size: GPUs of one part.

    Returns:
        what it chose, None where there is no choice.
    """
    import torch  # seconds, and known contexts need no model

    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = map(str, range(torch.cuda.device_count()))
    devices = list(every) if allowed is None else [name for name in allowed.split(",") if name]
    groups = len(devices) // tensor_parallel_size
    if part[1] == 1 or groups < 2:
        return None
    first = (part[0] - 1) % groups * tensor_parallel_size
    chosen = ",".join(devices[first : first + tensor_parallel_size])
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    return chosen


def make_scorer(
    backend: str, model: Path, safety_ids: Sequence[int], longest: int, settings: ScoreSettings
) -> Scorer:
    """Load the reference model into a backend.

    Args:
        backend: "vllm" or "transformers".
        model: directory of the reference model.
        safety_ids: columns of the result.
        longest: tokens of the longest context.
        settings: dtype, memory and batch.
    """
    if backend == "vllm":
        from pact_offline.scoring.vllm import VllmScorer

        return VllmScorer(model, safety_ids, longest, settings)
    from pact_offline.scoring.transformers import TransformersScorer

    return TransformersScorer(model, safety_ids, settings)

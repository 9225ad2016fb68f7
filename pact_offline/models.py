"""Loading models with transformers, and reading their logits at response steps only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pact_offline.errors import ModelError, SettingError
from pact_offline.hub import first_line, require_model


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    index = os.environ.get("LOCAL_RANK")  # of several processes, each has its own
    return accelerator if index is None else torch.device(accelerator.type, int(index))


def require_compiler() -> None:
    """Refuse to compile for a CPU without a C++ compiler, before a model is loaded."""
    compiler = os.environ.get("CXX", "g++")
    if default_device().type == "cpu" and shutil.which(compiler) is None:
        raise SettingError(f"--compile: expected a C++ compiler (g++, or CXX), found no {compiler}")


def load_model(
    model: str, dtype: str, *, attention: str = "auto", device: torch.device | None = None
) -> Any:
    """A causal language model in eval mode, from safetensors only.

    Args:
        model: path, or hub id.
        dtype: name of the weights' dtype.
        attention: an implementation of transformers; "auto": sdpa, but on a CPU, whose sdpa is slow
            in bfloat16 at chat lengths, `grouped_attention` for models that sdpa is right for, and
            eager for the others.
        device: default: `default_device`.

    Raises:
        MissingFileError, ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    require_model(model)
    device = device or default_device()
    is_cpu_default = attention == "auto" and device.type == "cpu"
    if attention == "auto":
        attention = "eager" if is_cpu_default else "sdpa"
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        if is_cpu_default and loaded._supports_sdpa:
            from pact_offline.attention import NAME

            loaded.set_attn_implementation(NAME)
    except Exception as error:
        raise ModelError(f"{model}: cannot be loaded: {first_line(error)}") from None
    return loaded.to(device).eval()


def aligned_batch(
    contexts: Sequence[tuple[Sequence[int] | np.ndarray, int]], pad_id: int
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Pad contexts so that their response steps stand in the same columns.

    Prompts are padded on the left and responses on the right, so the LM head can run on the
    response columns alone, whatever the lengths.

    Args:
        contexts: (ids, response_start) each.
        pad_id: fills the padding; masked out.

    Returns:
        model inputs (input_ids, attention_mask, position_ids, each int64 [batch, tokens]); the
        columns of the response steps, int64 [columns]; each context's number of steps.
    """
    starts = [start for _, start in contexts]
    steps = [len(ids) - start + 1 for ids, start in contexts]
    left = max(starts)
    width = left - 1 + max(steps)
    shape = (len(contexts), width)
    ids_out = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (ids, start) in enumerate(contexts):
        first = left - start
        ids_out[row, first : first + len(ids)] = torch.as_tensor(np.asarray(ids), dtype=torch.long)
        mask[row, first : first + len(ids)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_out, "attention_mask": mask, "position_ids": positions}
    return inputs, torch.arange(left - 1, width), steps


@torch.inference_mode()
def response_logits(
    model: Any, contexts: Sequence[tuple[Sequence[int] | np.ndarray, int]]
) -> list[Tensor]:
    """Each context's logits at its response steps, [steps, vocabulary], on the model's device."""
    inputs, columns, steps = aligned_batch(contexts, pad_id=0)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    output = model(**inputs, logits_to_keep=columns.to(model.device), use_cache=False)
    return [output.logits[row, :count] for row, count in enumerate(steps)]

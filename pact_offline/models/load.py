"""Loading causal language models with transformers."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from pact_offline.errors import ModelError, SettingError
from pact_offline.models.locate import require_model, why_not_loaded


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
        attention: an implementation of transformers; "auto": what transformers takes for the model,
            but on a CPU, whose sdpa is slow in bfloat16 at chat lengths, `grouped_attention` for
            models that sdpa is right for, and eager for the others.
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
    chosen = attention if attention != "auto" else "eager" if is_cpu_default else None
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            attn_implementation=chosen,
            use_safetensors=True,
            trust_remote_code=False,
        )
        if is_cpu_default and loaded._supports_sdpa:
            from pact_offline.models.cpu_attention import NAME

            loaded.set_attn_implementation(NAME)
    except Exception as error:
        raise ModelError(f"{model}: cannot be loaded: {why_not_loaded(error)}") from None
    return loaded.to(device).eval()

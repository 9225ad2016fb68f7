"""Loading causal language models with transformers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pact_offline.errors import ModelError, SettingError
from pact_offline.models.locate import (
    locate_model,
    looks_like_path,
    require_model,
    require_safetensors,
    why_not_loaded,
)


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
    if default_device().type == "cpu" and " " in torch.__file__:  # it gives its linker that path
        raise SettingError(
            "--compile: expected torch at a path without a space, as its own compiler wants, found "
            f"{torch.__file__}"
        )


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
    folder = Path(model) if looks_like_path(model) else locate_model(model).path
    require_safetensors(folder)
    device = device or default_device()
    is_cpu_default = attention == "auto" and device.type == "cpu"
    chosen = attention if attention != "auto" else "eager" if is_cpu_default else None
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=chosen,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if is_cpu_default and loaded._supports_sdpa:
            from pact_offline.models.cpu_attention import NAME

            loaded.set_attn_implementation(NAME)
    except Exception as error:
        raise ModelError(f"{model}: cannot be loaded: {why_not_loaded(error)}") from None
    if missing := sorted(found["missing_keys"]):  # transformers takes random numbers there
        raise ModelError(
            f"{model}: expected weights of all that config.json describes, found none of "
            f"{missing[0]}{f' and {len(missing) - 1} others' if missing[1:] else ''}"
        )
    return loaded.to(device).eval()

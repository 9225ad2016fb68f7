"""Loading causal language models with transformers."""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pact_offline.errors import ModelError, SettingError, first_line
from pact_offline.models.few_bits import mend_few_bits
from pact_offline.models.locate import (
    locate_model,
    looks_like_path,
    require_model,
    require_safetensors,
    why_not_loaded,
)
from pact_offline.models.quantised import quantised

log = logging.getLogger(__name__)


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


def require_trainable_attention(attention: str) -> None:
    """Refuse an implementation that has no backward pass on this machine's device."""
    if attention == "flex_attention" and default_device().type == "cpu":
        raise SettingError(
            "--attention flex_attention: expected a GPU, found a CPU, where torch has no backward "
            "pass of it"
        )


def without_adapter(model: Any) -> Any:
    """The model of transformers, also where peft has put an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_soft_cap(config: Any) -> bool:
    """Whether a model bounds its attention's scores, as Gemma-2 does and sdpa does not."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


_REFUSED = re.compile(r"^- `(\w+)`: ", re.MULTILINE)  # as `validate` lists keys


def make_savable(model: Any, name: str) -> None:
    """Take out of a generation config what transformers would refuse to save, and say so.

    It refuses what it does not heed, as values for sampling where nothing is sampled or a pad below
    0, and some models have them.

    Raises:
        ModelError: it would refuse something else, or an end.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = first_line(error)
        unused = {key: getattr(config, key, None) for key in _REFUSED.findall(str(error))}
    if unused and "eos_token_id" not in unused:
        for key in unused:
            setattr(config, key, None)
        with suppress(ValueError):
            config.validate(strict=True)
            log.warning(
                "%s: generation config: what is saved has no %s, of no use there",
                name,
                ", ".join(f"{key} {value}" for key, value in unused.items()),
            )
            return
    raise ModelError(f"{name}: generation config: expected one that can be saved, found {reason}")


def model_class(config: Any) -> Any:
    """What loads a model: also one that sees or hears beside text, where it is no text model too.

    Raises:
        ValueError: transformers knows no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])


def empty_model(model: str) -> Any:
    """A model without weights, on the meta device.

    Raises:
        ModelError: transformers cannot make it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{model}: cannot be made: {why_not_loaded(error)}") from None


def _leave_quantisation(model: Any, dtype: torch.dtype) -> None:
    """Finish a model whose quantised weights transformers has made full ones of.

    It gives those of mxfp4 in bfloat16, whatever it is asked for. It would quantise them again
    where they are saved, in part, and without a word of it in the config.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype)
    model._weight_conversions = None


def load_model(
    model: str,
    dtype: str,
    *,
    attention: str = "auto",
    device: torch.device | None = None,
    load_in: str | None = None,
) -> Any:
    """A causal language model in eval mode, from safetensors only.

    Args:
        model: path, or hub id.
        dtype: name of the weights' dtype.
        attention: an implementation of transformers; "auto": what transformers takes for the model,
            but on a CPU, whose sdpa is slow in bfloat16 at chat lengths, `grouped_attention` for
            models that sdpa is right for, and eager for the others; and eager where scores are
            bounded (Gemma-2), which sdpa would leave out.
        device: default: `default_device`.
        load_in: "8bit" or "4bit" (nf4, quantised twice): linear modules are held so.

    Raises:
        MissingFileError, ModelError: it cannot be loaded, or is quantised already.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    require_model(model)
    folder = Path(model) if looks_like_path(model) else locate_model(model).path
    require_safetensors(folder)
    device = device or default_device()
    is_cpu_default = attention == "auto" and device.type == "cpu"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if attention == "sdpa" and has_soft_cap(config):
            raise ValueError("its attention has a soft cap, which sdpa leaves out; take eager")
        is_eager = is_cpu_default or has_soft_cap(config)
        chosen = attention if attention != "auto" else "eager" if is_eager else None
        loaded, found = model_class(config).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=chosen,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantised(config, load_in, dtype),
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
    if device.type == "cuda":
        # cuDNN's attention plans every shape anew, 2 to 4 ms each, and each batch has another.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if getattr(loaded, "is_quantized", False):  # is where its loader has put it
        mend_few_bits(loaded)
        return loaded.eval()
    if getattr(config, "quantization_config", None) is not None:
        _leave_quantisation(loaded, getattr(torch, dtype))
    return loaded.to(device).eval()

"""The model that is trained, made ready."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.pytorch_utils import Conv1D

from pact_offline.errors import SettingError, first_line
from pact_offline.models.load import load_model
from pact_offline.settings.stages import FinetuneSettings


def compile_layers(policy: Any) -> None:
    """Compile each of a model's layers by itself: they share one compilation, for all lengths.

    The model around them stays as it is, so its LM head can still be held back.
    """
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    kinds = set(inner._no_split_modules or [])
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    if not layers:
        raise SettingError(
            f"--compile: expected known layers, found none in {type(inner).__name__}"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def check_lora_modules(model: str, settings: FinetuneSettings) -> None:
    """Refuse a name of `--lora-modules` that the model has no module of, before weights are loaded.

    A model that cannot be made without its weights is left to `prepare_policy`.

    Raises:
        SettingError: names the candidates.
    """
    if settings.method == "full" or settings.lora_modules == ("all-linear",):
        return
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # loading it will say what is wrong
        return
    _require_modules(empty, model, settings)


def _require_modules(policy: Any, model: str, settings: FinetuneSettings) -> None:
    excluded = re.compile(_layers_before(settings.lora_first_layer) or "(?!)")
    modules = {n: m for n, m in policy.named_modules() if not excluded.fullmatch(n)}
    for wanted in settings.lora_modules:
        if not any(f".{name}".endswith(f".{wanted}") for name in modules):
            linear = (n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D))
            candidates = sorted({name.rpartition(".")[2] for name in linear})
            first = settings.lora_first_layer
            raise SettingError(
                f"--lora-modules: expected modules of {model}"
                f"{f' from layer {first} on' if first else ''} ({', '.join(candidates)}), or "
                f"all-linear alone; found {wanted!r}"
            )


def prepare_policy(model: str, settings: FinetuneSettings) -> Any:
    """Load the policy, with an adapter for LoRA (in fp32 over base weights in the dtype)."""
    set_seed(settings.seed)
    if settings.method == "full":
        return load_model(model, "float32", attention=settings.attention).train()
    from peft import LoraConfig, get_peft_model

    policy = load_model(model, settings.dtype, attention=settings.attention)
    if settings.lora_modules != ("all-linear",):
        _require_modules(policy, model, settings)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_modules)
        if settings.lora_modules != ("all-linear",)
        else "all-linear",
        exclude_modules=_layers_before(settings.lora_first_layer),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(policy, config)
    except ValueError as error:
        raise SettingError(
            f"--lora-modules: expected modules of {model}, found {first_line(error)}"
        ) from None


def _layers_before(first: int) -> str | None:
    """A pattern of the modules of the layers 0 to first - 1, as peft reads it."""
    if not first:
        return None
    return rf".*\.(layers|h|blocks)\.({'|'.join(map(str, range(first)))})\..*"

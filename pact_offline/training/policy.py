"""The model that is trained, made ready."""

from __future__ import annotations

from typing import Any

from transformers import set_seed

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


def prepare_policy(model: str, settings: FinetuneSettings) -> Any:
    """Load the policy, with an adapter for LoRA (in fp32 over base weights in the dtype)."""
    set_seed(settings.seed)
    if settings.method == "full":
        return load_model(model, "float32", attention=settings.attention).train()
    from peft import LoraConfig, get_peft_model

    policy = load_model(model, settings.dtype, attention=settings.attention)
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

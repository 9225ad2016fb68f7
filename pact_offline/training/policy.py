"""The model that is trained, made ready."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import set_seed

from pact_offline.errors import SettingError, first_line
from pact_offline.models.load import load_model, make_savable, without_adapter
from pact_offline.models.log_confidences import keeps_packed_rows_apart
from pact_offline.models.packed_attention import NAME, runs_packed
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.lora import with_adapter

log = logging.getLogger(__name__)


def prepare_to_pack(policy: Any, settings: FinetuneSettings, model: str) -> None:
    """Let a policy see each of the packed rows alone.

    Args:
        policy: from `prepare_policy`. On a GPU it is given `packed_attention` where that can be.
        settings: of the run.
        model: its name, for messages.

    Raises:
        SettingError: it sees one row in the next all the same.
    """
    inner = without_adapter(policy)
    if settings.attention == "auto" and runs_packed(inner):
        own = inner.config._attn_implementation
        inner.set_attn_implementation(NAME)
        try:
            if keeps_packed_rows_apart(policy):
                return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # as of a torch that was built without the kernel
            log.warning("--packing: by a mask, since torch's kernel says: %s", first_line(error))
        inner.set_attn_implementation(own)
    if not keeps_packed_rows_apart(policy):
        raise SettingError(
            f"--packing: expected a model that keeps packed rows apart, found {model}, which sees "
            "one in the next; train it without"
        )


def prepare_policy(model: str, settings: FinetuneSettings) -> Any:
    """Load the policy, with an adapter for LoRA (in fp32 over base weights in the dtype)."""
    set_seed(settings.seed)
    if settings.method == "full":
        whole = load_model(model, "float32", attention=settings.attention)
        if getattr(whole, "is_quantized", False):
            raise SettingError(
                f"--method full: expected --method lora for {model}, whose weights are quantised"
            )
        make_savable(whole, model)
        return whole.train()
    policy = load_model(
        model, settings.dtype, attention=settings.attention, load_in=settings.load_in
    )
    return with_adapter(policy, model, settings)

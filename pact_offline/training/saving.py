"""What was trained, saved and loaded again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pact_offline.models.saved import (
    adapter_alone,
    adapter_weights,
    require_adapter_saved,
    require_model_saved,
    weights_left,
)
from pact_offline.training.trainer import PactTrainer

log = logging.getLogger(__name__)


def save_weights(
    trainer: PactTrainer, gathered: dict[str, Any], folder: Path, output: Path, model: str
) -> None:
    """Save what was trained, and load it again before anybody relies on it.

    Args:
        trainer: that is done.
        gathered: the policy's state, whole.
        folder: to save to.
        output: where that will be in the end.
        model: its name, for messages.

    Raises:
        InputError: says why not, and where the weights are left.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    is_whole = not hasattr(policy, "peft_config")
    weights = gathered if is_whole else adapter_weights(gathered)
    with weights_left(weights, folder, output):
        policy.save_pretrained(folder, state_dict=dict(gathered))
        if trainer.is_deepspeed_enabled:  # there loading is for all processes together
            log.warning("%s: DeepSpeed: what was saved is not loaded again to compare it", output)
        elif is_whole:
            require_model_saved(folder, weights, model)
        else:
            into = adapter_alone(policy, weights) if trainer.is_fsdp_enabled else policy
            require_adapter_saved(folder, weights, into, model)

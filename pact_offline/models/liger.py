"""Liger's kernels for norms and gates. Loads torch only where it is used."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from pact_offline.errors import SettingError


def require_liger(model: str) -> None:
    """Refuse Liger's kernels where they are not, or have nothing for a model, before it is loaded.

    Args:
        model: directory, or hub id.

    Raises:
        SettingError: there is no GPU, no liger-kernel, or no kernel for the model's family.
    """
    from transformers import AutoConfig

    from pact_offline.models.load import default_device

    if default_device().type == "cpu":
        raise SettingError("--liger: expected a GPU, found a CPU")
    if find_spec("liger_kernel") is None:
        raise SettingError(
            "--liger: expected an installed liger-kernel, found none; install pact-offline[liger]"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if kind not in known:
        raise SettingError(f"--liger: expected a family that liger-kernel knows, found {kind}")


def use_liger(model: Any) -> None:
    """Swap a model's norms and gates for Liger's, and those of no other.

    Its rotary embeddings stay the model's own, since Liger's are a function of the whole family's.
    The loss is this project's own, on response steps alone, so Liger's cross-entropies stay off.
    """
    from transformers.integrations.liger import apply_liger_kernel

    own = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    family = sys.modules[type(model).__module__]
    before = dict(vars(family))
    apply_liger_kernel(model, own)
    # Liger also swaps the classes that the next model would be made of.
    for name, value in before.items():
        if vars(family)[name] is not value:
            setattr(family, name, value)

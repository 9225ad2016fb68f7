"""Weights in few bits, by bitsandbytes. Loads torch only where it is used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pact_offline.errors import SettingError


def require_quantisation(load_in: str | None) -> None:
    """Refuse to hold weights in few bits without bitsandbytes."""
    if load_in is not None and find_spec("bitsandbytes") is None:
        raise SettingError(
            f"--load-in {load_in}: expected an installed bitsandbytes, found none; install "
            "pact-offline[quantised]"
        )


def quantised(config: Any, load_in: str | None, dtype: str) -> dict[str, Any]:
    """What transformers is told for weights in few bits.

    Args:
        config: of the model.
        load_in: "8bit", or "4bit" (nf4, quantised twice); None: nothing.
        dtype: that is computed in.

    Raises:
        ValueError: the model is quantised already.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if load_in is None:
        return {}
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"it is quantised already, so --load-in {load_in} cannot be")
    is_four = load_in == "4bit"
    chosen = BitsAndBytesConfig(
        load_in_4bit=is_four,
        load_in_8bit=not is_four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": chosen}

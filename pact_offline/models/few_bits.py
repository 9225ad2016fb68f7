"""What bitsandbytes' linear modules do not do by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MOST_DIMENSIONS = 3  # of an input, with 8bit


def mend_few_bits(model: Any) -> None:
    """Let a model in few bits take every input, and train after it was asked in eval mode.

    In eval mode on some CPUs, bitsandbytes packs the weights of 4bit anew, for a kernel that
    computes in bfloat16, knows few sizes and has no gradient: what trains afterwards stands still.
    With 8bit it takes inputs of at most three dimensions.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
        elif kind == "Linear8bitLt":
            module.forward = _of_any_dimensions(module.forward)


def _of_any_dimensions(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        if x.dim() <= _MOST_DIMENSIONS:
            return forward(x)
        return forward(x.flatten(0, -3)).unflatten(0, x.shape[:-2])

    return call

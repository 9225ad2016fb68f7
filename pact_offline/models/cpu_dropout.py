"""LoRA's dropout, at a fraction of what torch's costs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("pact_offline::dropout_factors", mutates_args=())
def _factors(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """0 with probability `p` (to the nearest 1/65536), else what keeps the mean; as `like`."""
    random = torch.Generator().manual_seed(int(seed))
    size, dropped = like.numel(), min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-size // 4), dtype=torch.int64)
    bits = draws.random_(-(2**63), None, generator=random).view(torch.int16)
    bits = bits[:size].view(like.shape)
    kept = torch.ge(bits, dropped - 2**15, out=torch.empty_like(like))
    return kept.mul_(1 / (1 - dropped / 2**16))


@_factors.register_fake
def _(seed: Tensor, like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like)


class CpuDropout(nn.Dropout):
    """`nn.Dropout` that draws 16 bits an element on a CPU, where torch draws and casts a float.

    Draws from torch's generator, so a seed and a restored state repeat it. Other devices have a
    fast kernel, and take that.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input`, of any shape and floating dtype, and scale the others."""
        if input.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(input)
        # A compiler would make one call of two that look alike: each has its own seed.
        seed = torch.randint(2**62, ())
        factors: Tensor = _factors(seed, input.detach(), self.p)
        return input * factors


def use_fast_dropout(policy: Any) -> None:
    """Swap the dropouts of a peft model's LoRA layers, and keep their input in its own dtype.

    The cast to fp32 before the dropout gave values that autocast rounds back to bfloat16.
    """
    from peft.tuners.lora import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[name] = CpuDropout(dropout.p).train(dropout.training)

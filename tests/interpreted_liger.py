"""Liger's real kernels without a GPU, by Triton's interpreter: how far each family named moves.

A process of its own: Triton asks whether to interpret when a kernel is defined.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton.language as tl
from tiny import logits_and_gradients, make_model
from triton.runtime import interpreter

from pact_offline.models.liger import use_liger
from pact_offline.models.load import load_model


def interpret_what_is_left_out() -> None:
    """What the interpreter lacks: numbers that are no integers, and CUDA's own functions."""
    convert = interpreter._implicit_cvt

    def convert_floats_too(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert_floats_too
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def largest_differences(model: str) -> dict[str, float]:
    """Of logits, and of any gradient relative to its largest entry, with and without Liger's."""
    ids = torch.arange(3, 19).reshape(2, 8)
    found = []
    for is_liger in (False, True):
        policy = load_model(model, "float32")
        if is_liger:
            use_liger(policy)
        found.append(logits_and_gradients(policy, ids))
    (plain, gradients), (ours, others) = found
    return {
        "logits": (ours - plain).abs().max().item(),
        "gradient": max(
            ((others[n] - g).abs().max() / g.abs().max().clamp_min(1e-9)).item()
            for n, g in gradients.items()
        ),
    }


if __name__ == "__main__":
    interpret_what_is_left_out()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({
            family: largest_differences(str(make_model(Path(folder, family), family=family)))
            for family in sys.argv[1:]
        }))  # fmt: skip

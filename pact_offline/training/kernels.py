"""Other kernels for a policy, taken where they keep its loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pact_offline.errors import PactError, SettingError, first_line
from pact_offline.models.liger import use_liger
from pact_offline.models.load import default_device
from pact_offline.models.log_confidences import (
    log_probabilities_of,
    logits_at_steps,
    probing_batch,
)
from pact_offline.settings.stages import FinetuneSettings

_OWN_ATTENTION = ("auto", "eager", "sdpa")
# Of the largest logit, and of the gradient's norm. bfloat16 moves a logit by 1 %.
_LOGIT_MOVES, _GRADIENT_MOVES = 5e-2, 0.2
_COMPARED = 16  # trained tensors, of at most so many elements: a whole gradient may be 32 GB
_ELEMENTS = 2**24


class _Probe(NamedTuple):
    """Logits at some steps [steps, vocabulary], and the gradient of their loss [elements]."""

    logits: Tensor
    gradient: Tensor


def take_kernels(policy: Any, settings: FinetuneSettings) -> None:
    """Give a policy Liger's kernels and compiled layers, as the settings say.

    On a CPU these have tests; what a GPU's compilers make depends on their versions too, so there
    each, and an attention by name, is compared with the model's own kernels first.

    Args:
        policy: from `prepare_policy`, changed in place.
        settings: of the run.

    Raises:
        SettingError: a kernel does not run, or moves the loss or the gradient.
    """
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    ways: dict[str, Callable[[], object]] = {}
    if settings.liger:
        ways["--liger"] = lambda: use_liger(inner)
    if settings.compile:
        ways["--compile"] = lambda: compile_layers(policy)
    if default_device().type == "cpu":
        for take in ways.values():
            take()
        return
    if (attention := settings.attention) not in _OWN_ATTENTION:
        inner.set_attn_implementation("eager")
        ways = {
            f"--attention {attention}": lambda: inner.set_attn_implementation(attention),
            **ways,
        }
    if not ways:
        return
    plain = _probed(policy, settings)
    for way, take in ways.items():
        try:
            take()
            found = _probed(policy, settings)
        except PactError:
            raise
        except Exception as error:
            raise SettingError(
                f"{way}: expected kernels that run here, found: {first_line(error)}"
            ) from None
        if not _are_same(found, plain):
            raise SettingError(
                f"{way}: expected kernels that keep the policy's loss and gradient, found others; "
                "train without"
            )


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


def _probed(policy: Any, settings: FinetuneSettings) -> _Probe:
    batch, device = probing_batch(packed=settings.packing), policy.device
    was_training = policy.training
    policy.eval()  # without dropout
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        logits = logits_at_steps(policy, batch)
    policy.train(was_training)
    loss = -log_probabilities_of(logits, batch.labels[batch.is_step].to(device)).sum()
    some = [p for p in policy.parameters() if p.requires_grad and p.numel() <= _ELEMENTS]
    found = torch.autograd.grad(loss, some[:_COMPARED], allow_unused=True)
    parts = [part.flatten().float() for part in found if part is not None]
    return _Probe(logits.detach().float(), torch.cat(parts) if parts else logits.new_zeros(1))


def _are_same(found: _Probe, plain: _Probe) -> bool:
    moved = (found.logits - plain.logits).abs().max() <= _LOGIT_MOVES * plain.logits.abs().max()
    turned = (found.gradient - plain.gradient).norm() <= _GRADIENT_MOVES * plain.gradient.norm()
    return bool(moved) and bool(turned)  # no comparison holds with a NaN

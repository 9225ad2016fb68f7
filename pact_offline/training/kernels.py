"""Other kernels for a policy, taken where they keep its loss and its gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pact_offline.errors import PactError, SettingError, first_line
from pact_offline.models.liger import use_liger
from pact_offline.models.load import default_device, has_soft_cap, without_adapter
from pact_offline.models.log_confidences import (
    Aligned,
    aligned_batch,
    log_probabilities_of,
    logits_at_steps,
    packed_batch,
)
from pact_offline.models.packed_attention import NAME as PACKED
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.tokenized import TokenizedRows
from pact_offline.settings.stages import FinetuneSettings

log = logging.getLogger(__name__)

_PACKED = "--packing"
_OWN_ATTENTION = ("auto", "eager", "sdpa")
# Shares of the largest logit, and of the gradient's norm. In fp32 eager and sdpa differ by less
# than 0.1 %; in bfloat16, on chat rows of a 135M model, by 2 % and 5 %, elsewhere by more.
_ALWAYS = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 1e-1)}
_NOISE = 4  # times what two of the model's own attentions differ by
_COMPARED = 16  # trained tensors, of at most so many elements: a whole gradient may be 32 GB
_ELEMENTS = 2**24


class _Probe(NamedTuple):
    """Logits at some steps [steps, vocabulary], and the gradient of their loss [elements]."""

    logits: Tensor
    gradient: Tensor

    def moved_from(self, other: _Probe) -> tuple[float, float]:
        """The largest difference of a logit, and the gradients' distance; shares of the other's."""
        logits = (self.logits - other.logits).abs().max() / other.logits.abs().max()
        return float(logits), float(
            (self.gradient - other.gradient).norm() / other.gradient.norm().clamp(min=1e-30)
        )


def take_kernels(
    policy: Any, settings: FinetuneSettings, rows: TokenizedRows | Sequence[TokenizedExample]
) -> None:
    """Give a policy Liger's kernels and compiled layers, as the settings say.

    On a CPU these have tests; what a GPU's compilers make depends on their versions too. So there
    each, and an attention by name or for packed rows, is compared with the model's own kernels on
    the first rows. They may differ by some times what two of the model's own attentions do.

    Args:
        policy: from `prepare_policy`, changed in place.
        settings: of the run.
        rows: of the run.

    Raises:
        SettingError: a kernel does not run, or moves the loss or the gradient.
    """
    inner = without_adapter(policy)
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
        ways = {f"--attention {attention}": lambda: None, **ways}
    is_packed = inner.config._attn_implementation == PACKED
    if is_packed:
        ways = {_PACKED: lambda: None, **ways}
    if not ways:
        return
    if policy.device.type == "cuda":  # Triton starts kernels on the current one
        torch.cuda.set_device(policy.device)
    probe = _Prober(policy, settings, _batch(settings, rows))
    way = next(iter(ways))
    try:
        plain, limits = _own(probe, inner, settings)
        for way, take in ways.items():
            take()
            moved = probe().moved_from(plain)
            # No comparison holds with a NaN.
            is_kept = all(share <= limit for share, limit in zip(moved, limits, strict=True))
            if not is_kept and way == _PACKED:
                inner.set_attn_implementation("sdpa")
                log.warning(
                    "--packing: by a mask, since torch's kernel moves logits by %.2g and the "
                    "gradient by %.2g",
                    *moved,
                )
                continue
            if not is_kept:
                raise SettingError(
                    f"{way}: expected kernels that move logits by at most {limits[0]:.2%} and the "
                    f"gradient by {limits[1]:.2%}, found {moved[0]:.2%} and {moved[1]:.2%}; train "
                    "without"
                )
            log.info("%s: logits move by %.2g, the gradient by %.2g", way, *moved)
    except (PactError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SettingError(
            f"{way}: expected kernels that run here, found: {first_line(error)}"
        ) from None


def compile_layers(policy: Any) -> None:
    """Compile each of a model's layers by itself: they share one compilation, for all lengths.

    The model around them stays as it is, so its LM head can still be held back.
    """
    inner = without_adapter(policy)
    kinds = set(inner._no_split_modules or [])
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    if not layers:
        raise SettingError(
            f"--compile: expected known layers, found none in {type(inner).__name__}"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def _batch(settings: FinetuneSettings, rows: TokenizedRows | Sequence[TokenizedExample]) -> Aligned:
    """The first rows, as they are trained: padded or packed, and no more than a batch has."""
    some = [rows[index] for index in range(min(2, settings.batch_size, len(rows)))]
    contexts = [
        (row.ids[: row.turns[-1].end], [(turn.start, turn.end) for turn in row.turns])
        for row in some
    ]
    return packed_batch(contexts) if settings.packing else aligned_batch(contexts, 0)


class _Prober:
    """Runs a policy forward and backward on one batch, as in training but without dropout."""

    def __init__(self, policy: Any, settings: FinetuneSettings, batch: Aligned) -> None:
        self._policy, self._settings, self._batch = policy, settings, batch
        trained = [p for p in policy.parameters() if p.requires_grad and p.numel() <= _ELEMENTS]
        self._some = trained[:_COMPARED]
        self._labels = batch.labels[batch.is_step].to(policy.device)

    def __call__(self) -> _Probe:
        policy, in_bfloat16 = self._policy, self._settings.dtype == "bfloat16"
        with (
            _without_dropout(policy),
            torch.autocast(policy.device.type, torch.bfloat16, enabled=in_bfloat16),
        ):
            logits = logits_at_steps(policy, self._batch)
        loss = -log_probabilities_of(logits, self._labels).sum()
        found = torch.autograd.grad(loss, self._some, allow_unused=True) if self._some else ()
        parts = [part.flatten().float() for part in found if part is not None]
        gradient = torch.cat(parts) if parts else logits.new_zeros(1).float()
        return _Probe(logits.detach().float(), gradient)


@contextmanager
def _without_dropout(policy: Any) -> Iterator[None]:
    dropouts = [one for one in policy.modules() if isinstance(one, nn.Dropout) and one.training]
    for one in dropouts:
        one.eval()
    try:
        yield
    finally:
        for one in dropouts:
            one.train()


def _own(
    probe: _Prober, inner: Any, settings: FinetuneSettings
) -> tuple[_Probe, tuple[float, ...]]:
    """What the model's own kernels give, and how much others may move that."""
    chosen, always = inner.config._attn_implementation, _ALWAYS[settings.dtype]
    found = []
    for name in ("eager", "sdpa"):
        if name == "eager" or (inner._supports_sdpa and not has_soft_cap(inner.config)):
            inner.set_attn_implementation(name)
            if inner.config._attn_implementation != name:
                raise RuntimeError(f"{type(inner).__name__} takes no {name} attention")
            found.append(probe())
    inner.set_attn_implementation(chosen)
    plain, *others = found
    noise = others[0].moved_from(plain) if others else (0.0, 0.0)
    pairs = zip(always, noise, strict=True)
    return plain, tuple(max(least, _NOISE * share) for least, share in pairs)

"""The LM head on response steps only, and in chunks where their logits would fill the memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pact_offline.errors import ModelError

_LOGITS_AT_ONCE = 2**26  # 256 MiB in fp32
_is_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # heads that were compared


class StepLogProbabilities(NamedTuple):
    """Full-vocabulary log-probabilities at response steps.

    Attributes:
        labels: fp32 [steps], of the tokens that follow.
        safety: fp32 [steps, ids], of the safety tokens.
        rest: fp32 [steps], of all ids but those left out; None where it was not wanted.
    """

    labels: Tensor
    safety: Tensor
    rest: Tensor | None


def step_log_probabilities(
    model: Any,
    batch: dict[str, Tensor],
    places: Tensor,
    labels: Tensor,
    safety_ids: Tensor | None,
    outside: Tensor | None = None,
) -> StepLogProbabilities:
    """The policy's log-probabilities of the labels, and of the safety tokens, at response steps.

    The model's forward runs as it is wrapped (DDP, autocast); its LM head is held back and runs on
    the response steps alone. Where their logits exceed 256 MiB they come in chunks, and are
    computed again in the backward pass in place of being kept. Models whose head cannot be run by
    itself (sharded, compiled, or with a treatment of logits that is not known here) run whole.

    Args:
        model: policy, whose forward takes `logits_to_keep`.
        batch: from `ResponseCollator`.
        places: int64 [steps], of the response steps among rows x columns, row by row.
        labels: int64 [steps], the tokens that follow.
        safety_ids: int64 [ids], or None; as many as the vocabulary has stand in its order.
        outside: int64 [some], ids that `rest` leaves out, each once and not the whole vocabulary;
            None: no rest is wanted.

    Raises:
        ModelError: the model gives other columns than it is asked for.
    """
    inputs: dict[str, Any] = {
        name: batch[name]
        for name in ("input_ids", "attention_mask", "position_ids")
        if name in batch
    }
    inputs |= {"logits_to_keep": batch["logits_to_keep"], "use_cache": False}
    ids = labels.new_empty(0) if safety_ids is None else safety_ids
    columns = len(batch["logits_to_keep"])
    inner = getattr(model, "module", model)
    head = inner.get_output_embeddings()
    if head is None or _is_sharded(model, head) or not _is_known.get(head, True):
        logits = model(**inputs).logits
        require_columns(inner, logits, columns)
        return log_probabilities(_at(logits, places), labels, ids, outside)
    outputs, hidden, mode = _without_head(model, head, inputs)
    if hidden is None:  # compiled: hooks are not heard
        require_columns(inner, outputs.logits, columns)
        return log_probabilities(_at(outputs.logits, places), labels, ids, outside)
    require_columns(inner, hidden, columns)

    def logits_of(states: Tensor) -> Tensor:
        with mode:
            return _after_head(head(states), inner.config.get_text_config())

    if head not in _is_known:
        with torch.no_grad():
            found = logits_of(hidden[:, :1].contiguous()).float()
        _is_known[head] = torch.allclose(found, outputs.logits.float(), rtol=1e-3, atol=1e-3)
        if not _is_known[head]:
            return step_log_probabilities(model, batch, places, labels, safety_ids, outside)

    def part(states: Tensor, labels: Tensor) -> StepLogProbabilities:
        return log_probabilities(logits_of(states), labels, ids, outside)

    states = _at(hidden, places)
    size = steps_at_once(head.weight.shape[0])
    if len(states) <= size:
        return part(states, labels)
    parts = [
        checkpoint(part, some, theirs, use_reentrant=False)
        for some, theirs in zip(torch.split(states, size), torch.split(labels, size), strict=True)
    ]
    picked, safety, rest = zip(*parts, strict=True)
    return StepLogProbabilities(
        torch.cat(picked), torch.cat(safety), None if outside is None else torch.cat(rest)
    )


def steps_at_once(vocabulary: int) -> int:
    """Response steps whose logits, in fp32, take 256 MiB."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


def require_columns(model: Any, values: Tensor, columns: int) -> None:
    """Refuse a model that gives other columns than it is asked for.

    Args:
        model: of transformers.
        values: what it gave, [rows, columns, ...].
        columns: of `logits_to_keep`.

    Raises:
        ModelError: they are others, so no step could be told from another.
    """
    if values.shape[1] != columns:
        raise ModelError(
            f"{model.config._name_or_path}: expected a model that gives logits at the "
            f"{columns} places that it is asked for, found {values.shape[1]} (logits_to_keep)"
        )


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Rows of some values [rows, columns, ...], [places, ...]."""
    return values.flatten(0, 1).index_select(0, places)


def log_probabilities(
    logits: Tensor, labels: Tensor, ids: Tensor, outside: Tensor | None = None
) -> StepLogProbabilities:
    """As `step_log_probabilities`, of logits [steps, vocabulary].

    The rest has a gradient however small it is. Nothing waits for a GPU, and what is picked out of
    the vocabulary is picked at once, since the gradient of each such look-up is as large as it.
    """
    logits = logits.float()
    if len(ids) == logits.shape[-1] and outside is None:  # in order: the whole distribution
        every = logits.log_softmax(dim=-1)
        return StepLogProbabilities(every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), every, None)
    apart = ids.new_empty(0) if outside is None else outside
    columns = torch.cat((ids, apart)).expand(len(labels), -1)
    picked = logits.gather(-1, torch.cat((labels.unsqueeze(-1), columns), dim=-1))
    own, safety, inside = torch.split(picked, [1, len(ids), len(apart)], dim=-1)
    if outside is None:
        normaliser, rest = logits.logsumexp(dim=-1, keepdim=True), None
    else:
        others = logits.index_fill(-1, outside, -torch.inf).logsumexp(dim=-1, keepdim=True)
        odds = inside.logsumexp(dim=-1, keepdim=True) - others
        surplus = torch.nn.functional.softplus(odds)
        normaliser, rest = others + surplus, -surplus.squeeze(-1)
    return StepLogProbabilities((own - normaliser).squeeze(-1), safety - normaliser, rest)


def _without_head(
    model: Any, head: Any, inputs: dict[str, Any]
) -> tuple[Any, Tensor | None, AbstractContextManager[Any]]:
    """Run a model up to its head, which gets the first column once, to compare, then none."""
    kept: list[Tensor] = []
    modes: list[AbstractContextManager[Any]] = []
    columns = 0 if head in _is_known else 1

    def hold_back(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(given[0])
        kind = given[0].device.type
        if torch.is_autocast_enabled(kind):
            modes.append(torch.autocast(kind, torch.get_autocast_dtype(kind)))
        # Of a slice, torch makes a copy of the head for each row on a CPU.
        return (given[0][:, :columns].contiguous(), *given[1:])

    hook = head.register_forward_pre_hook(hold_back)
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    return outputs, kept[0] if kept else None, modes[0] if modes else nullcontext()


def _after_head(logits: Tensor, config: Any) -> Tensor:
    """What some architectures do with logits: a soft cap (Gemma), a scale (Cohere, Granite)."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = (logits / cap).tanh() * cap
    return logits


def _is_sharded(model: Any, head: Any) -> bool:
    """Weights that are whole only inside the model's own forward: FSDP, DeepSpeed's third stage."""
    weight = head.weight
    return (
        hasattr(weight, "ds_id")
        or hasattr(weight, "device_mesh")
        or type(model).__name__ == "FullyShardedDataParallel"
    )

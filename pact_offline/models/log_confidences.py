"""Contexts as a model's batch, and its log-probabilities at their response steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pact_offline.models.lm_head import log_probabilities, require_columns, steps_at_once
from pact_offline.models.load import without_adapter

Spans = Sequence[tuple[int, int]]
IGNORED = -100


class Aligned(NamedTuple):
    """Contexts as one batch.

    Attributes:
        inputs: model inputs (input_ids, attention_mask, position_ids, each int64 [batch, tokens]).
        columns: token columns whose logits predict the responses, int64 [columns].
        labels: int64 [batch, columns], the token that each column predicts; -100 where it is none
            of the response's.
    """

    inputs: dict[str, Tensor]
    columns: Tensor
    labels: Tensor

    @property
    def is_step(self) -> Tensor:
        """Where a response step is, bool [batch, columns]."""
        return self.labels != IGNORED


def aligned_batch(
    contexts: Sequence[tuple[Sequence[int] | np.ndarray, Spans]], pad_id: int
) -> Aligned:
    """Pad contexts so that their first response steps stand in the same column.

    What is before is padded on the left and what follows on the right, so the LM head can run on
    the response columns alone, whatever the lengths. The last token of a context is not fed, it
    only is predicted.

    Args:
        contexts: ids, and start and end of each run of response tokens.
        pad_id: fills the padding; masked out.
    """
    starts = [spans[0][0] for _, spans in contexts]
    left = max(starts)
    within = max(spans[-1][1] - spans[0][0] for _, spans in contexts)
    shape = (len(contexts), left - 1 + within)
    ids_out = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full((len(contexts), within), IGNORED, dtype=torch.long)
    for row, (ids, spans) in enumerate(contexts):
        given = torch.from_numpy(np.array(ids, dtype=np.int64))  # a copy: maps are read-only
        first = left - starts[row]
        ids_out[row, first : first + len(ids) - 1] = given[:-1]
        mask[row, first : first + len(ids) - 1] = 1
        for start, end in spans:
            labels[row, start - starts[row] : end - starts[row]] = given[start:end]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_out, "attention_mask": mask, "position_ids": positions}
    return Aligned(inputs, torch.arange(left - 1, shape[1]), labels)


def packed_batch(contexts: Sequence[tuple[Sequence[int] | np.ndarray, Spans]]) -> Aligned:
    """Contexts one after the other as a batch of one row, with no padding.

    Positions begin anew with each, and by them transformers (without an attention mask) keeps each
    context to itself, in every kind of attention.

    Args:
        contexts: as of `aligned_batch`.
    """
    ids, positions, columns, labels = [], [], [], []
    begins = 0
    for given, spans in contexts:
        tokens = torch.from_numpy(np.array(given, dtype=np.int64))
        steps = torch.cat([torch.arange(start, end) for start, end in spans])
        ids.append(tokens[:-1])
        positions.append(torch.arange(len(tokens) - 1))
        columns.append(begins + steps - 1)
        labels.append(tokens[steps])
        begins += len(tokens) - 1
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None]}
    return Aligned(inputs, torch.cat(columns), torch.cat(labels)[None])


_SHORT = (np.arange(1, 4), [(1, 3)])
_LONG = (np.arange(1, 10), [(6, 9)])
# Shares of the largest logit. A state that went on over padding moved it by 2 % and more, other
# states by nothing; a row that was seen in the next moved it by most of it, bfloat16 by 1 %.
_STATE_MOVES, _ANOTHER_ROW = 5e-3, 5e-2


def reads_padding(model: Any) -> bool:
    """Whether a model's values depend on what its attention mask leaves out.

    Some recurrent models carry padding on in their state (RWKV, RecurrentGemma), others do not, and
    no config tells: one context is run by itself and padded, once a model.
    """
    inner = without_adapter(model)
    if not getattr(inner, "_is_stateful", False):
        return False
    if not hasattr(inner, "_reads_padding"):
        inner._reads_padding = not _is_same(model, aligned_batch([_SHORT, _LONG], 0), _STATE_MOVES)
    return bool(inner._reads_padding)


def keeps_packed_rows_apart(model: Any) -> bool:
    """Whether a model that is given a `packed_batch` sees each context alone; a run of it tells.

    A model with a state or a convolution over tokens may carry little over, less than bfloat16
    rounds. So behind another context of the same length its values have to be the same to the last
    bit. (Not so of every model: what an expert gets may change how it rounds.)
    """
    batch = packed_batch([_LONG, _SHORT])
    if not _is_same(model, batch, _ANOTHER_ROW, last=True):
        return False
    inner = without_adapter(model)
    convolves = any(isinstance(module, torch.nn.Conv1d) for module in inner.modules())
    if not convolves and not getattr(inner, "_is_stateful", False):
        return True
    behind_another = packed_batch([(_LONG[0][::-1], _LONG[1]), _SHORT])
    return torch.equal(*_short_logits(model, [batch, behind_another], last=True))


def _is_same(model: Any, batch: Aligned, tolerance: float, *, last: bool = False) -> bool:
    """Whether the short context has in a batch, as its first or last, the logits it has alone."""
    (alone,) = _short_logits(model, [aligned_batch([_SHORT], 0)])
    (among,) = _short_logits(model, [batch], last=last)
    difference = (among.float() - alone.float()).abs().max()
    return bool(difference <= tolerance * alone.float().abs().max())


@torch.inference_mode()
def _short_logits(model: Any, batches: Sequence[Aligned], *, last: bool = False) -> list[Tensor]:
    """The short context's in each batch, as its first or last, without dropout."""
    was_training, steps = model.training, len(_SHORT[0]) - 1
    model.eval()
    found = [logits_at_steps(model, batch) for batch in batches]
    model.train(was_training)
    return [logits[-steps:] if last else logits[:steps] for logits in found]


def logits_at_steps(model: Any, batch: Aligned) -> Tensor:
    """Logits at a batch's response steps, [steps, vocabulary]."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    output = model(**inputs, logits_to_keep=batch.columns.to(model.device), use_cache=False)
    require_columns(model, output.logits, len(batch.columns))
    found: Tensor = output.logits[batch.is_step.to(model.device)]
    return found


@torch.inference_mode()
def response_logits(
    model: Any, contexts: Sequence[tuple[Sequence[int] | np.ndarray, Spans | int]]
) -> list[Tensor]:
    """Each context's logits at its response steps, [steps, vocabulary], on the model's device.

    Args:
        model: of transformers.
        contexts: ids, and start and end of each run of response tokens, or where all that follows
            is the response.
    """
    runs = [(ids, [(at, len(ids))] if isinstance(at, int) else at) for ids, at in contexts]
    if reads_padding(model):
        return [logits for one in runs for logits in _padded_logits(model, [one])]
    return _padded_logits(model, runs)


def _padded_logits(
    model: Any, contexts: Sequence[tuple[Sequence[int] | np.ndarray, Spans]]
) -> list[Tensor]:
    batch = aligned_batch(contexts, pad_id=0)
    return [*torch.split(logits_at_steps(model, batch), batch.is_step.sum(dim=1).tolist())]


def log_probabilities_at(logits: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
    """Full-vocabulary log-softmax at some ids, fp32 [..., ids]; of logits [..., vocabulary]."""
    logits = logits.float()
    return logits[..., ids] - logits.logsumexp(dim=-1, keepdim=True)


def log_probabilities_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Full-vocabulary log-softmax at one label a step, fp32 [steps]; of [steps, vocabulary]."""
    logits = logits.float()
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(dim=-1)


@torch.inference_mode()
def response_log_confidences(
    model: Any,
    contexts: Sequence[tuple[Sequence[int] | np.ndarray, Spans]],
    ids: Sequence[int],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each context's log-confidences, float32 [steps, ids], and those of its labels, [steps]."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for some in [[one] for one in contexts] if reads_padding(model) else [contexts]:
        batch = aligned_batch(some, pad_id=0)
        logits, labels = logits_at_steps(model, batch), batch.labels[batch.is_step].to(model.device)
        wanted, size = torch.tensor(ids, device=model.device).long(), steps_at_once(logits.shape[1])
        pieces = zip(torch.split(logits, size), torch.split(labels, size), strict=True)
        parts = [log_probabilities(part, theirs, wanted) for part, theirs in pieces]
        safety = torch.cat([part.safety for part in parts]).cpu().numpy()
        own = torch.cat([part.labels for part in parts]).cpu().numpy()
        ends = batch.is_step.sum(dim=1).cumsum(dim=0)[:-1].tolist()
        found += zip(np.split(safety, ends), np.split(own, ends), strict=True)
    return found

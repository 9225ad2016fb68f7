"""A model's logits at response steps, and log-confidences at some ids of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def aligned_batch(
    contexts: Sequence[tuple[Sequence[int] | np.ndarray, int]], pad_id: int
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Pad contexts so that their response steps stand in the same columns.

    Prompts are padded on the left and responses on the right, so the LM head can run on the
    response columns alone, whatever the lengths.

    Args:
        contexts: (ids, response_start) each.
        pad_id: fills the padding; masked out.

    Returns:
        model inputs (input_ids, attention_mask, position_ids, each int64 [batch, tokens]); the
        columns of the response steps, int64 [columns]; each context's number of steps.
    """
    starts = [start for _, start in contexts]
    steps = [len(ids) - start + 1 for ids, start in contexts]
    left = max(starts)
    width = left - 1 + max(steps)
    shape = (len(contexts), width)
    ids_out = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (ids, start) in enumerate(contexts):
        first = left - start
        ids_out[row, first : first + len(ids)] = torch.as_tensor(np.asarray(ids), dtype=torch.long)
        mask[row, first : first + len(ids)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_out, "attention_mask": mask, "position_ids": positions}
    return inputs, torch.arange(left - 1, width), steps


@torch.inference_mode()
def response_logits(
    model: Any, contexts: Sequence[tuple[Sequence[int] | np.ndarray, int]]
) -> list[Tensor]:
    """Each context's logits at its response steps, [steps, vocabulary], on the model's device."""
    inputs, columns, steps = aligned_batch(contexts, pad_id=0)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    output = model(**inputs, logits_to_keep=columns.to(model.device), use_cache=False)
    return [output.logits[row, :count] for row, count in enumerate(steps)]


def log_probabilities_at(logits: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
    """Full-vocabulary log-softmax at some ids, fp32 [..., ids]; of logits [..., vocabulary]."""
    logits = logits.float()
    return logits[..., ids] - logits.logsumexp(dim=-1, keepdim=True)


def response_log_confidences(
    model: Any, contexts: Sequence[tuple[Sequence[int] | np.ndarray, int]], ids: Sequence[int]
) -> list[np.ndarray]:
    """Each context's log-confidences at its response steps, float32 [steps, ids]."""
    found = response_logits(model, contexts)
    return [log_probabilities_at(logits, list(ids)).cpu().numpy() for logits in found]

"""True confidences held to the reference's, as a pure function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_offline.objectives.inputs import DEFAULTS, finite
from pact_offline.settings.stages import ObjectiveSettings


def _with_rest(log_confidences: Tensor) -> Tensor:
    """Append the log of the probability that is left over; [steps, ids + 1]."""
    inside = torch.logsumexp(log_confidences, dim=-1, keepdim=True).clamp(max=-1e-6)
    return torch.cat((log_confidences, torch.log(-torch.expm1(inside))), dim=-1)


def confidence(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
) -> Tensor:
    """KL(reference || policy) over the weighted safety ids and one class for all the rest.

    Zero exactly when the policy's confidences are the reference's.

    Args:
        policy: [steps, ids], the policy's log-confidences (not logits); any float dtype.
        full: [steps, ids], the reference's with the prompt.
        response_only: not read.
        weights: [ids]; ids with weight 0 fall into the rest.
        steps: not read.
        settings: not read.

    Returns:
        fp32 [steps].
    """
    kept = weights > 0
    ours, theirs = _with_rest(finite(policy)[:, kept]), _with_rest(finite(full)[:, kept])
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)

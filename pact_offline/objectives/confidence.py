"""True confidences held to the reference's, as a pure function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_offline.objectives.inputs import DEFAULTS, finite
from pact_offline.settings.stages import ObjectiveSettings

_NEAREST = -6e-8  # the largest log-probability below 0 that fp32 tells from it


def log_rest(log_confidences: Tensor) -> Tensor:
    """The log of the probability that is left over, [steps, 1]; exact to fp32's last digit of 1."""
    inside = torch.logsumexp(log_confidences, dim=-1, keepdim=True).clamp(max=_NEAREST)
    return torch.log(-torch.expm1(inside))


def confidence(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
    policy_rest: Tensor | None = None,
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
        policy_rest: [steps], the log of the policy's probability outside the weighted ids, from the
            logits there. Without it that is 1 less the others, which has no gradient where they
            hold more than fp32 tells from 1: just where a policy that refuses for sure has to be
            pulled back.

    Returns:
        fp32 [steps].
    """
    kept = weights > 0
    ours, theirs = finite(policy)[:, kept], finite(full)[:, kept]
    rest = log_rest(ours) if policy_rest is None else finite(policy_rest).unsqueeze(-1)
    ours, theirs = torch.cat((ours, rest), -1), torch.cat((theirs, log_rest(theirs)), -1)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)

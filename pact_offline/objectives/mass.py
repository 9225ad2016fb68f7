"""The probability of all safety tokens together, held to the reference's: a plain yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_offline.objectives.inputs import DEFAULTS, LOWEST, finite
from pact_offline.settings.stages import ObjectiveSettings


def mass(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
) -> Tensor:
    """The squared difference of the log-probabilities that one of the weighted ids follows.

    Zero exactly when those agree, however the probability lies among the ids.

    Args:
        policy: [steps, ids], the policy's log-confidences (not logits); any float dtype.
        full: [steps, ids], the reference's with the prompt.
        response_only: not read.
        weights: [ids]; ids with weight 0 do not count.
        steps, settings: not read.

    Returns:
        fp32 [steps]: (log sum over ids of exp(policy) - log sum over ids of exp(full))^2.
    """
    left_out = weights <= 0
    ours, theirs = (
        torch.logsumexp(finite(values).masked_fill(left_out, LOWEST), dim=-1)
        for values in (policy, full)
    )
    return (ours - theirs) ** 2

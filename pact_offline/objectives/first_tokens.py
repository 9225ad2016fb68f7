"""Fine-tuning that holds the first tokens most (arXiv 2406.05946): a pure function of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_offline.objectives.inputs import DEFAULTS, finite
from pact_offline.settings.stages import ObjectiveSettings


def first_tokens(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
    *,
    policy_label: Tensor,
    reference_label: Tensor,
) -> Tensor:
    """The constrained objective of Qi et al. 2024, equation 3, in place of the cross-entropy.

    Its gradient is that of the cross-entropy times 2 (1 - sigmoid(beta * gap)): 1 where policy and
    reference agree, and less the likelier the policy has made the token; for beta to 0 it is 1
    everywhere.

    Args:
        policy, full, response_only, weights: not read.
        steps: int [steps], number of each step in its answer; below 0 counts as 0.
        settings: `betas`.
        policy_label: [steps], the policy's log-probability of the response's own token.
        reference_label: [steps], the reference's with the prompt.

    Returns:
        fp32 [steps]: -(2 / beta) * log sigmoid(beta * (policy_label - reference_label)).
    """
    betas = torch.tensor(settings.betas, device=steps.device)
    beta = betas[steps.clamp(0, len(betas) - 1)]
    gap = finite(policy_label) - finite(reference_label)
    return -(2 / beta) * F.logsigmoid(beta * gap)

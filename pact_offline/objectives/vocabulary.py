"""The whole distribution held to the reference's: a yardstick, from a reference in memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pact_offline.objectives.inputs import DEFAULTS, finite
from pact_offline.settings.stages import ObjectiveSettings


def vocabulary(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
) -> Tensor:
    """KL(reference || policy) over the whole vocabulary.

    Args:
        policy: [steps, vocabulary], the policy's log-probabilities (not logits); any float dtype.
        full: [steps, vocabulary], the reference's with the prompt.
        response_only, weights, steps, settings: not read.

    Returns:
        fp32 [steps].
    """
    return F.kl_div(finite(policy), finite(full), reduction="none", log_target=True).sum(dim=-1)

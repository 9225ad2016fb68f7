"""An objective of the study: confidences, given that the response's own token is not said."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_offline.objectives.confidence import log_rest
from pact_offline.objectives.inputs import LOWEST, finite
from pact_offline.settings.stages import ObjectiveSettings

_SAME = 1e-5  # of log-probabilities of one token, computed in two ways


def given_not_label(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings,
    *,
    policy_label: Tensor,
    reference_label: Tensor,
) -> Tensor:
    """KL(reference || policy) of p(id) / (1 - p(label)), over the weighted ids and all the rest.

    It has no gradient at the label's logit, so that it takes nothing from the cross-entropy there.
    Which id is the label is not told, but it is the one of the label's probability.

    Returns:
        fp32 [steps]; 0 where the policy is the reference.
    """
    kept = weights > 0
    is_label = ((policy - policy_label.unsqueeze(-1)).abs() < _SAME)[:, kept]
    given = []
    for values, of_label in ((policy, policy_label), (full, reference_label)):
        label = finite(of_label).unsqueeze(-1)
        others = finite(values)[:, kept].masked_fill(is_label, LOWEST)
        rest = log_rest(torch.cat((others, label), -1))
        given.append(torch.cat((others, rest), -1) - log_rest(label))
    ours, theirs = given
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)


given_not_label.needs_labels = True  # type: ignore[attr-defined]

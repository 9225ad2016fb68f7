"""The published objective (arXiv 2603.07445), as a pure function of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_offline.errors import SettingError
from pact_offline.objectives.inputs import DEFAULTS, finite
from pact_offline.settings.stages import ObjectiveSettings

_SMALLEST = 1e-12


def count_to_mass(scores: Tensor, mass: float, temperature: float = 1.0) -> Tensor:
    """How many of the likeliest entries are needed to hold probability `mass`.

    Returns:
        [steps]: 1 + the number of entries of the descending cumulative sum of
        softmax(scores / temperature) that are below `mass`.
    """
    shares = torch.softmax(scores / temperature, dim=-1)
    cumulative = shares.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return 1 + (cumulative < mass).sum(dim=-1)


def mix(
    policy: Tensor, response_only: Tensor, steps: Tensor, settings: ObjectiveSettings
) -> Tensor:
    """Share c(t) of the response-only target in the mixed target, [steps]; no gradient."""
    with torch.no_grad():
        ids = policy.shape[-1]
        breadth_policy = count_to_mass(policy, settings.gate_mass, settings.gate_temperature)
        breadth_reference = count_to_mass(
            response_only, settings.gate_mass, settings.gate_temperature
        )
        gap = (breadth_policy - breadth_reference).float() / ids
        gate = torch.sigmoid(settings.alpha * (gap - settings.bias))
        late = (steps - settings.window).clamp(min=0).float()
        if settings.tau > 0:
            decay = torch.exp(-late / settings.tau)
        else:
            decay = (steps < settings.window).float()
        return gate * decay * settings.boost


def pact(
    policy: Tensor,
    full: Tensor,
    response_only: Tensor | None,
    weights: Tensor,
    steps: Tensor,
    settings: ObjectiveSettings = DEFAULTS,
) -> Tensor:
    """The published objective (arXiv 2603.07445), per response step.

    Every softmax is over the safety ids only, so logits may stand in for log-confidences.

    Args:
        policy: [steps, ids], the policy's log-confidences; any float dtype.
        full: [steps, ids], the reference's with the prompt.
        response_only: [steps, ids], the reference's without the prompt; not read with the gate off.
        weights: [ids], safety-token weights; one below 0 counts as 0.
        steps: int [steps], number of each step in its answer; below 0 before the answer's own text.
        settings: T, alpha, bias, gate and window.

    Returns:
        fp32 [steps]: T^2 * sum over ids of q * (log q - log_softmax(policy / T)).
    """
    policy, target = finite(policy), finite(full)
    if settings.gate:
        if response_only is None:
            raise SettingError("pact: expected response_only where the gate is on, found None")
        response_only = finite(response_only)
        share = mix(policy, response_only, steps, settings).unsqueeze(-1)
        target = (1 - share) * target + share * response_only
    shares = torch.softmax(target / settings.temperature, dim=-1) * weights.float().clamp(min=0)
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    gap = shares.clamp(min=_SMALLEST).log() - F.log_softmax(policy / settings.temperature, dim=-1)
    return settings.temperature**2 * (shares * gap).sum(dim=-1)

"""The regularisers, as pure functions of tensors.

Both take log-confidences (full-vocabulary log-softmax at the safety ids) of the policy and of the
reference, one row per response step, and compute in fp32. Adding an objective is one function
here and one entry in `OBJECTIVES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pact_offline.config import ObjectiveSettings
from pact_offline.errors import SettingError

_LOWEST = -1e5  # stands in for -inf, so that 0 * -inf cannot make a NaN
_SMALLEST = 1e-12

DEFAULTS = ObjectiveSettings.model_validate({})


def _finite(values: Tensor) -> Tensor:
    return values.float().clamp(min=_LOWEST)


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
        weights: [ids], safety-token weights, at least 0.
        steps: int [steps], index of each step in its response.
        settings: T, alpha, bias, gate and window.

    Returns:
        fp32 [steps]: T^2 * sum over ids of q * (log q - log_softmax(policy / T)).
    """
    policy, target = _finite(policy), _finite(full)
    if settings.gate:
        if response_only is None:
            raise SettingError("pact: expected response_only where the gate is on, found None")
        response_only = _finite(response_only)
        share = mix(policy, response_only, steps, settings).unsqueeze(-1)
        target = (1 - share) * target + share * response_only
    shares = torch.softmax(target / settings.temperature, dim=-1) * weights.float()
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    gap = shares.clamp(min=_SMALLEST).log() - F.log_softmax(policy / settings.temperature, dim=-1)
    return settings.temperature**2 * (shares * gap).sum(dim=-1)


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
    ours, theirs = _with_rest(_finite(policy)[:, kept]), _with_rest(_finite(full)[:, kept])
    return (theirs.exp() * (theirs - ours)).sum(dim=-1)


@dataclass(frozen=True)
class Objective:
    """An entry of the registry.

    Attributes:
        per_step: the function, with the arguments of `pact`.
        needs_response_only: whether the targets without the prompt are read (with the gate on).
    """

    per_step: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, ObjectiveSettings], Tensor]
    needs_response_only: bool


OBJECTIVES: dict[str, Objective] = {
    "pact": Objective(pact, needs_response_only=True),
    "confidence": Objective(confidence, needs_response_only=False),
}


def weights_in_use(weights: Tensor, settings: ObjectiveSettings) -> Tensor:
    """The safety tokens' weights as the settings want them, [ids].

    Raises:
        SettingError: nothing would be held to the reference.
    """
    if not settings.safety_weights:
        weights = torch.ones_like(weights)
    if not (weights > 0).any():
        raise SettingError(
            "safety tokens: expected one with a weight above 0, found none; use others, or "
            "--safety-weights false"
        )
    if settings.objective == "pact" and len(weights) < 2:
        raise SettingError(
            "--objective pact: expected two safety tokens or more, found one, and its share among "
            "one is always 1; use --objective confidence"
        )
    return weights


def step_weights(steps: Tensor, settings: ObjectiveSettings) -> Tensor:
    """How much the regulariser counts at each response step, fp32 [steps]."""
    return torch.where(steps < settings.first_steps, settings.first_weight, 1.0)


def kl_weight_at(progress: float, settings: ObjectiveSettings) -> float:
    """The regulariser's weight at a point of training; 0 is the first step, 1 the last."""
    start, end = settings.kl_weight, settings.kl_weight_end
    if settings.kl_schedule == "linear":
        return start + (end - start) * progress
    if settings.kl_schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    return start

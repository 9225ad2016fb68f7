"""The loss of one batch, for any training loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pact_offline.errors import SettingError
from pact_offline.models.lm_head import step_log_probabilities
from pact_offline.models.log_confidences import IGNORED
from pact_offline.objectives.registry import objective_named, step_weights
from pact_offline.settings.stages import ObjectiveSettings


class BatchLoss(NamedTuple):
    """Sums over a batch's response steps, and their count; divide by it for means.

    Attributes:
        loss: cross_entropy + kl_weight * kl, fp32 []; the only one with a gradient.
        cross_entropy, kl: fp32 [].
        confidence_gap: sum over safety tokens of the probabilities' absolute differences, fp32 [].
        steps: response steps.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    confidence_gap: Tensor
    steps: int


def batch_loss(
    model: Any,
    batch: dict[str, Tensor],
    safety_ids: Tensor | None = None,
    weights: Tensor | None = None,
    settings: ObjectiveSettings | None = None,
    kl_weight: float | None = None,
) -> BatchLoss:
    """Run the policy on a batch; the LM head runs on response steps only.

    Args:
        model: policy, whose forward takes `logits_to_keep`.
        batch: from `ResponseCollator`, on the model's device.
        safety_ids: int64 [ids]; None: plain fine-tuning.
        weights: float [ids], safety-token weights.
        settings: the objective and its shape; None: `pact`'s, or plain without `safety_ids`.
        kl_weight: in place of the settings'; a `kl_schedule` is the caller's, by `kl_weight_at`.
    """
    labels = batch["labels"][:, 1:]
    is_step = labels != IGNORED
    if settings is None:
        settings = ObjectiveSettings(objective="none" if safety_ids is None else "pact")
    objective = objective_named(settings.objective)
    if objective is not None and (safety_ids is None or weights is None):
        raise SettingError(f"objective {settings.objective}: expected safety ids and weights")
    if weights is not None and not settings.safety_weights:
        weights = torch.ones_like(weights)
    outside = None
    if objective is not None and objective.needs_rest:
        assert safety_ids is not None
        assert weights is not None
        outside = safety_ids[weights > 0]
    found = step_log_probabilities(model, batch, is_step, labels[is_step], safety_ids, outside)
    cross_entropy = -found.labels.sum()
    zero = torch.zeros((), device=cross_entropy.device)
    count = len(found.labels)
    if objective is None:
        return BatchLoss(cross_entropy, cross_entropy.detach(), zero, zero, count)
    full = batch["target_full"]
    steps = batch["step_numbers"][is_step]
    only = batch.get("target_response_only")
    rest = {} if found.rest is None else {"policy_rest": found.rest}
    per_step = objective.per_step(found.safety, full, only, weights, steps, settings, **rest)
    kl = (per_step * step_weights(steps, settings)).sum()
    weight = settings.kl_weight if kl_weight is None else kl_weight
    gap = (found.safety.detach().exp() - full.exp()).abs().sum()
    loss = cross_entropy + weight * kl
    return BatchLoss(loss, cross_entropy.detach(), kl.detach(), gap, count)

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
    """Sums over a batch's response steps, and their counts.

    Attributes:
        loss: what to divide by `steps` for the mean loss: of the steps that are learnt, their mean
            cross-entropy, and of all kl_weight * their mean kl; fp32 [], with a gradient. Without
            the former where the objective stands in its place.
        cross_entropy: over the steps that are learnt, fp32 [], with a gradient.
        kl: over all steps, each as often as the batch's `step_weights` say, fp32 [], with a
            gradient where there is an objective.
        confidence_gap: over the steps that are learnt, the sum over safety tokens of the
            probabilities' absolute differences, fp32 [].
        held_gap: the same over the others.
        steps: response steps.
        learnt: those of them that are learnt; the others are held only.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    confidence_gap: Tensor
    held_gap: Tensor
    steps: int
    learnt: int


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
        batch: from `ResponseCollator`, on the model's device; with labels for an objective that
            needs them.
        safety_ids: int64 [ids]; None: plain fine-tuning.
        weights: float [ids], safety-token weights.
        settings: the objective and its shape; None: the defaults, or plain without `safety_ids`.
        kl_weight: in place of the settings'; a `kl_schedule` is the caller's, by `kl_weight_at`.

    Raises:
        SettingError: the objective lacks what it needs, or replaces the cross-entropy of steps
            that are not to be learnt.
    """
    following = batch["labels"][:, 1:].flatten()
    # Looked up before the model runs: on a GPU each look-up waits for all that was asked of it.
    places = _places(following != IGNORED)
    labels = following[places]
    is_learnt = batch.get("is_learnt")
    own, others = (None, None) if is_learnt is None else (_places(is_learnt), _places(~is_learnt))
    count = len(places)
    learnt = count if own is None else len(own)
    if settings is None:
        settings = ObjectiveSettings(**({"objective": "none"} if safety_ids is None else {}))
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
    ids, among = safety_ids, None
    if objective is not None and objective.needs_vocabulary:
        ids, among = torch.arange(batch["target_full"].shape[-1], device=labels.device), safety_ids
    if objective is not None and objective.replaces_cross_entropy and learnt < count:
        raise SettingError(
            f"objective {settings.objective}: expected steps that are all learnt, found "
            f"{count - learnt} of {count} that are held"
        )
    found = step_log_probabilities(model, batch, places, labels, ids, outside)
    cross_entropy = -(found.labels if own is None else found.labels[own]).sum()
    mean = cross_entropy * (count / max(1, learnt))
    zero = torch.zeros((), device=cross_entropy.device)
    if objective is None:
        return BatchLoss(mean, cross_entropy, zero, zero, zero, count, learnt)
    full = batch["target_full"]
    steps = batch["step_numbers"].flatten()[places]
    only = batch.get("target_response_only")
    extra = {} if found.rest is None else {"policy_rest": found.rest}
    if objective.needs_labels:
        extra |= {"policy_label": found.labels, "reference_label": batch["target_label"]}
    per_step = objective.per_step(found.safety, full, only, weights, steps, settings, **extra)
    counted = per_step * step_weights(steps, settings)
    kl = (counted * batch["step_weights"] if "step_weights" in batch else counted).sum()
    weight = settings.kl_weight if kl_weight is None else kl_weight
    moved = found.safety.detach().exp() - full.exp()
    gaps = (moved if among is None else moved[:, among]).abs().sum(dim=-1)
    held = zero if others is None else gaps[others].sum()
    loss = weight * kl if objective.replaces_cross_entropy else mean + weight * kl
    return BatchLoss(loss, cross_entropy, kl, gaps.sum() - held, held, count, learnt)


def _places(is_one: Tensor) -> Tensor:
    """Where a mask is set, int64 [places]."""
    return is_one.nonzero().squeeze(1)

"""The objectives by name, and how much each step and token counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pact_offline.errors import SettingError
from pact_offline.objectives.checked import checked
from pact_offline.objectives.confidence import confidence
from pact_offline.objectives.first_tokens import first_tokens
from pact_offline.objectives.mass import mass
from pact_offline.objectives.pact import pact
from pact_offline.objectives.vocabulary import vocabulary
from pact_offline.own_code import installed_names, is_own, load
from pact_offline.settings.stages import ObjectiveSettings


@dataclass(frozen=True)
class Objective:
    """An entry of the registry.

    Attributes:
        per_step: the function, with the arguments of `pact`.
        needs_response_only: whether the targets without the prompt are read (with the gate on).
        needs_rest: whether it also takes `policy_rest`, as `confidence` does.
        needs_labels: whether it also takes `policy_label` and `reference_label`, as `first_tokens`
            does.
        needs_vocabulary: whether its ids are all of the vocabulary, which no cache holds.
        replaces_cross_entropy: whether it is what is learnt, and not beside it.
    """

    per_step: Callable[..., Tensor]
    needs_response_only: bool = False
    needs_rest: bool = False
    needs_labels: bool = False
    needs_vocabulary: bool = False
    replaces_cross_entropy: bool = False


OBJECTIVES: dict[str, Objective] = {
    "pact": Objective(pact, needs_response_only=True),
    "confidence": Objective(confidence, needs_rest=True),
    "first_tokens": Objective(first_tokens, needs_labels=True, replaces_cross_entropy=True),
    "mass": Objective(mass),
    "vocabulary": Objective(vocabulary, needs_vocabulary=True),
}
_TRAITS = [field.name for field in fields(Objective) if field.name != "per_step"]
_own: dict[str, Objective] = {}  # of this process: imported once


def objective_named(name: str) -> Objective | None:
    """The objective of a name; None for plain fine-tuning.

    A user's function, `path/to/file.py:function` or an entry point, takes the arguments of `pact`.
    It may carry the attributes of `Objective`, as `needs_response_only`, true as they are there.

    Raises:
        MissingFileError, SettingError: there is none of that name.
    """
    if name == "none":
        return None
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name in _own:
        return _own[name]
    if not is_own("objective", name):
        known = ", ".join(["none", *OBJECTIVES, *installed_names("objective")])
        raise SettingError(
            f"--objective: expected one of {known}, or path/to/file.py:function, found {name!r}"
        )
    function = load("objective", name)
    traits = {trait: bool(getattr(function, trait, False)) for trait in _TRAITS}
    return _own.setdefault(name, Objective(checked(name, function), **traits))


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
            "--no-safety-weights"
        )
    if settings.objective == "pact" and len(weights) < 2:
        raise SettingError(
            "--objective pact: expected two safety tokens or more, found one, and its share among "
            "one is always 1; use --objective confidence"
        )
    return weights


def step_weights(steps: Tensor, settings: ObjectiveSettings) -> Tensor:
    """How much the regulariser counts at each response step, fp32 [steps]."""
    is_first = (steps >= 0) & (steps < settings.first_steps)
    return torch.where(is_first, settings.first_weight, 1.0)


def kl_weight_at(progress: float, settings: ObjectiveSettings) -> float:
    """The regulariser's weight at a point of training; 0 is the first step, 1 the last."""
    start, end = settings.kl_weight, settings.kl_weight_end
    if settings.kl_schedule == "linear":
        return start + (end - start) * progress
    if settings.kl_schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    return start

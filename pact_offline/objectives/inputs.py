"""What every objective starts from."""

from __future__ import annotations

from torch import Tensor

from pact_offline.settings.stages import ObjectiveSettings

LOWEST = -1e5  # stands in for -inf, so that 0 * -inf cannot make a NaN
DEFAULTS = ObjectiveSettings.model_validate({})


def finite(values: Tensor) -> Tensor:
    return values.float().clamp(min=LOWEST)

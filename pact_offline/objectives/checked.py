"""An objective of a user's own, whose mistakes are told in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from pact_offline.errors import TrainingError, first_line


def checked(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function; where it gives no finite value with a gradient for each step, an error.

    Raises:
        TrainingError: (when called) says what was returned, or what the function raised.
    """

    @wraps(function)
    def per_step(policy: Tensor, *others: Any, **extra: Any) -> Tensor:
        try:
            values = function(policy, *others, **extra)
        except Exception as error:  # whatever a user's function raises
            raise TrainingError(
                f"--objective {name}: failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        problem = None
        if not isinstance(values, Tensor):
            problem = type(values).__name__
        elif values.shape != policy.shape[:1]:
            problem = f"a tensor of shape {[*values.shape]}"
        elif policy.requires_grad and not values.requires_grad:
            problem = "values that do not depend on the policy"
        elif not values.isfinite().all() and not policy.isnan().any():
            problem = f"{values[~values.isfinite()][0].item()}"
        if problem:
            raise TrainingError(
                f"--objective {name}: expected {len(policy)} finite values, one for each response "
                f"step, with a gradient; found {problem}"
            )
        return values

    return per_step

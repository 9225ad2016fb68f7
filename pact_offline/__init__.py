"""Fine-tune chat models without losing their refusals, from confidences that were scored once.

The names below are the library's public face. They load on first use, so that importing the
package (and the command line) stays fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PactTrainer": "pact_offline.training.trainer",
    "ResponseCollator": "pact_offline.training.collator",
    "SafetyTokens": "pact_offline.safety_tokens",
    "TargetCache": "pact_offline.cache.targets",
    "batch_loss": "pact_offline.training.loss",
    "confidence": "pact_offline.objectives",
    "pact": "pact_offline.objectives",
    "training_rows": "pact_offline.training.dataset",
}

__all__ = [
    "PactTrainer",
    "ResponseCollator",
    "SafetyTokens",
    "TargetCache",
    "batch_loss",
    "confidence",
    "pact",
    "training_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pact_offline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Where models are, loading them, and their log-probabilities at response steps."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"response_logits": "pact_offline.models.log_confidences"}  # loaded on first use


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pact_offline.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

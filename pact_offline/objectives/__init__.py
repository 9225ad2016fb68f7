"""The regularisers, as pure functions of tensors.

All take log-confidences (full-vocabulary log-softmax at the safety ids) of the policy and of the
reference, one row per response step, and compute in fp32.
"""

from pact_offline.objectives.confidence import confidence
from pact_offline.objectives.pact import pact
from pact_offline.objectives.registry import OBJECTIVES, Objective

__all__ = ["OBJECTIVES", "Objective", "confidence", "pact"]

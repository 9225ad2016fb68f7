"""Safety tokens: the ids whose confidence is held, and how much each counts."""

from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens
from pact_offline.texts import visible

__all__ = ["SafetyToken", "SafetyTokens", "visible"]

"""What a refusal is: by the built-in phrases, or by a user's own function."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pact_offline.evaluation.broken import broken_text, rules_sha256
from pact_offline.evaluation.judging import Verdict
from pact_offline.evaluation.refusals import is_refusal, languages, phrases_sha256
from pact_offline.own_code import content_of, load_verdict
from pact_offline.settings.evaluate import BUILT_IN_JUDGE


@dataclass(frozen=True)
class Judge:
    """Says whether an answer is a refusal.

    Attributes:
        name: as the user gave it.
        content: what fixes its verdicts: a SHA-256, or package and version.
        own: the user's own, (prompt, answer) to the verdict; None: the phrases.
    """

    name: str
    content: str
    own: Callable[[str, str], bool] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What `metrics.json` says of it."""
        if self.own is None:
            return {"name": "refusal phrases", "languages": languages(), "content": self.content}
        return {"name": self.name, "content": self.content}

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Whether each answer is a refusal; broken text is none by the phrases."""
        pairs = zip(prompts, answers, strict=True)
        return [Verdict(self.refuses(p, a, broken=broken_text(a))) for p, a in pairs]

    def refuses(self, prompt: str, answer: str, begun: str = "", broken: str | None = None) -> bool:
        """Whether an answer is a refusal.

        A user's own judge is given all of an answer that an attack has begun, and decides alone.
        Of the phrases, one must stand in what the model said itself, and broken text is no refusal.

        Args:
            prompt: its last turn.
            answer: what the model said.
            begun: what an attack began it with.
            broken: why the text is broken; None where it is not.
        """
        if self.own is not None:
            return self.own(prompt, f"{begun} {answer}".strip() if begun else answer)
        return broken is None and is_refusal(answer)


def load_judge(name: str) -> Judge:
    """The judge of a name: `phrases`, or a user's own.

    Raises:
        SettingError: no such function.
        MissingFileError: no such file.
    """
    if name != BUILT_IN_JUDGE:
        own = load_verdict("judge", name, ("prompt", "answer"))
        return Judge(name, content_of("judge", name) or "", own)
    content = hashlib.sha256(f"{phrases_sha256()} {rules_sha256()}".encode()).hexdigest()
    return Judge(name, content)

"""How far a policy's confidences on safety tokens have moved from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pact_offline.evaluation.metrics import Drift, TokenCurve
from pact_offline.models.log_confidences import log_probabilities_at, response_logits
from pact_offline.safety_tokens.file import SafetyTokens

_TOKENS_SHOWN = 6


def confidences_by_step(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    ids: Sequence[int],
    steps: int,
    batch_size: int,
) -> np.ndarray:
    """Mean probability of each safety id at each response step, teacher-forced on `answers`.

    Returns:
        float64 [steps, ids]; a step that no answer reaches is NaN.
    """
    contexts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        response = tokenizer(answer, add_special_tokens=False).input_ids
        # The step after the last token of an answer is read too, whatever it predicts there.
        read = [*prompt, *response, 0][: len(prompt) + steps]
        contexts.append((read, [(len(prompt), len(read))]))
    total, count = np.zeros((steps, len(ids))), np.zeros((steps, 1))
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        for logits in response_logits(model, batch):
            values = log_probabilities_at(logits, list(ids)).exp().cpu().numpy()
            total[: len(values)] += values
            count[: len(values)] += 1
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count)


def compare(reference: np.ndarray, policy: np.ndarray, tokens: SafetyTokens, prompts: int) -> Drift:
    """Curves of the reference, a policy, and the likeliest tokens.

    Args:
        reference: [reached steps, ids].
        policy: [steps, ids], at the same answers.
        tokens: the safety tokens.
        prompts: answers averaged over.
    """
    policy = policy[: len(reference)]
    weighted = tokens.weights > 0
    order = np.argsort(-reference.mean(axis=0) * weighted, kind="stable")[:_TOKENS_SHOWN]
    curves = [
        TokenCurve(
            id=tokens.tokens[i].id,
            text=tokens.tokens[i].text,
            weight=tokens.tokens[i].weight,
            reference=_rounded(reference[:, i]),
            policy=_rounded(policy[:, i]),
        )
        for i in order
        if weighted[i]
    ]
    return Drift(
        prompts=prompts,
        total_reference=_rounded(reference[:, weighted].sum(axis=1)),
        total_policy=_rounded(policy[:, weighted].sum(axis=1)),
        tokens=curves,
    )


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]

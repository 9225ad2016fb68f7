"""How far a policy has moved from the reference, teacher-forced on the reference's own answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Drift, TokenCurve
from pact_offline.models.log_confidences import Spans, log_probabilities_at, response_logits
from pact_offline.objectives.inputs import finite
from pact_offline.progress import bar
from pact_offline.safety_tokens.file import SafetyTokens

_TOKENS_SHOWN = 6

Context = tuple[Sequence[int], Spans]


class Divergences(NamedTuple):
    """KL(reference || policy) in nats at each response step, as a mean over answers.

    Attributes:
        safety: over the weighted safety tokens and one class for all the rest, float64 [steps].
        vocabulary: over all ids, float64 [steps]; never below `safety` but for rounding.
    """

    safety: np.ndarray
    vocabulary: np.ndarray


class KeptLogProbabilities:
    """Log-probabilities of all ids, on disk in the order in which they came.

    A second model is compared with them when the first is no longer in memory. 4 bytes a value; the
    file has no name, so a killed process leaves none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._shapes: list[tuple[int, int]] = []

    def add(self, values: Tensor) -> None:
        """Keep those of one answer, [steps, vocabulary].

        Raises:
            InputError: the disk has no room for them.
        """
        self._shapes.append((values.shape[0], values.shape[1]))
        try:
            values.float().cpu().contiguous().numpy().tofile(self._file)
        except OSError as error:
            raise InputError(
                f"{self._folder}: expected room for {values.shape[1] * 4 / 2**20:.1f} MiB a "
                f"response step, to measure the KL divergence, found: {error}"
            ) from None

    def __iter__(self) -> Iterator[Tensor]:
        """Those of each answer, fp32 [steps, vocabulary], on the CPU."""
        self._file.seek(0)
        for steps, ids in self._shapes:
            values = np.fromfile(self._file, np.float32, steps * ids)
            yield torch.from_numpy(values.reshape(steps, ids))

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


def answer_contexts(
    tokenizer: Any, prompts: Sequence[Sequence[int]], answers: Sequence[str], steps: int
) -> list[Context]:
    """Each prompt with the first `steps` steps of its answer.

    The step after the last token of an answer is read too, whatever it predicts there.
    """
    contexts: list[Context] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        response = tokenizer(answer, add_special_tokens=False).input_ids
        read = [*prompt, *response, 0][: len(prompt) + steps]
        contexts.append((read, [(len(prompt), len(read))]))
    return contexts


def confidences_by_step(
    model: Any,
    contexts: Sequence[Context],
    ids: Sequence[int],
    steps: int,
    batch_size: int,
    kept: KeptLogProbabilities | None = None,
) -> np.ndarray:
    """Mean probability of each safety id at each response step.

    Args:
        model: in eval mode.
        contexts: from `answer_contexts`.
        ids: the safety ids.
        steps: of `answer_contexts`.
        batch_size: contexts at once.
        kept: gets the log-probabilities of all ids, from the same pass.

    Returns:
        float64 [steps, ids]; a step that no answer reaches is NaN.
    """
    total, count = np.zeros((steps, len(ids))), np.zeros((steps, 1))
    for logits in _logits(model, contexts, batch_size, "reading answers"):
        values = log_probabilities_at(logits, list(ids)).exp().cpu().numpy()
        total[: len(values)] += values
        count[: len(values)] += 1
        if kept is not None:
            kept.add(logits.float().log_softmax(dim=-1))
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count)


def divergences_by_step(
    reference: Any,
    contexts: Sequence[Context],
    policy: KeptLogProbabilities,
    weighted: Sequence[int],
    steps: int,
    batch_size: int,
) -> Divergences:
    """KL(reference || policy) at each response step, as a mean over the answers that reach it.

    Args:
        reference: the reference model, in eval mode.
        contexts: from `answer_contexts`.
        policy: of the same contexts.
        weighted: safety ids of a weight above 0.
        steps: of `answer_contexts`.
        batch_size: contexts at once.
    """
    total, count = np.zeros((steps, 2)), np.zeros((steps, 1))
    read = _logits(reference, contexts, batch_size, "reading answers as the reference")
    for logits, ours in zip(read, policy, strict=True):
        theirs = logits.float().log_softmax(dim=-1)
        shared = min(theirs.shape[-1], ours.shape[-1])  # a table may be padded to another length
        theirs, ours = theirs[:, :shared], ours[:, :shared].to(theirs.device)
        safety = divergence(safety_classes(theirs, weighted), safety_classes(ours, weighted))
        values = torch.stack((safety, divergence(theirs, ours)), dim=-1).cpu().numpy()
        total[: len(values)] += values
        count[: len(values)] += 1
    with np.errstate(invalid="ignore"):
        return Divergences(*(total / count).T)


def divergence(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference || policy) in nats, [steps]; of log-probabilities, [steps, classes]."""
    reference, policy = finite(reference), finite(policy)
    return (reference.exp() * (reference - policy)).sum(dim=-1)


def safety_classes(log_probabilities: Tensor, weighted: Sequence[int]) -> Tensor:
    """The classes of the objective `confidence`: weighted safety ids, and all other ids together.

    Returns:
        log-probabilities, [steps, weighted ids + 1]; of those of all ids.
    """
    is_other = torch.ones(log_probabilities.shape[-1], dtype=torch.bool)
    is_other[list(weighted)] = False
    others = log_probabilities[:, is_other.to(log_probabilities.device)]
    rest = others.logsumexp(dim=-1, keepdim=True)
    return torch.cat((log_probabilities[:, list(weighted)], rest), dim=-1)


def _logits(
    model: Any, contexts: Sequence[Context], batch_size: int, what: str
) -> Iterator[Tensor]:
    """Each context's logits at its response steps, [steps, vocabulary]."""
    with bar(what, len(contexts), "answers") as progress:
        for first in range(0, len(contexts), batch_size):
            batch = contexts[first : first + batch_size]
            yield from response_logits(model, batch)
            progress.update(len(batch))


def compare(
    reference: np.ndarray,
    policy: np.ndarray,
    tokens: SafetyTokens,
    prompts: int,
    divergences: Divergences | None = None,
) -> Drift:
    """Curves of the reference, a policy, and the likeliest tokens.

    Args:
        reference: [reached steps, ids].
        policy: [steps, ids], at the same answers.
        tokens: the safety tokens.
        prompts: answers averaged over.
        divergences: of the policy; None: not measured.
    """
    reached = len(reference)
    policy = policy[:reached]
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
    drift = Drift(
        prompts=prompts,
        total_reference=_rounded(reference[:, weighted].sum(axis=1)),
        total_policy=_rounded(policy[:, weighted].sum(axis=1)),
        tokens=curves,
    )
    if divergences is None:
        return drift
    safety, vocabulary = (_divergence_values(values[:reached]) for values in divergences)
    return drift.model_copy(
        update={
            "kl_safety": safety,
            "kl_vocabulary": vocabulary,
            "kl_safety_mean": _mean(safety),
            "kl_vocabulary_mean": _mean(vocabulary),
        }
    )


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 7) if values else None


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _divergence_values(values: np.ndarray) -> list[float]:
    """Rounded to what fp32 tells; what rounding brought below 0 is 0."""
    return [round(max(float(value), 0.0), 7) for value in values]

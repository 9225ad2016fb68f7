"""Is a cache right? A sample of its contexts, scored again another way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pact_offline.cache.encoding import decode, encode, encode_labels
from pact_offline.cache.identity import compute_name, compute_parts
from pact_offline.cache.targets import TargetCache
from pact_offline.models.backends import choose_backend
from pact_offline.models.locate import ModelFiles
from pact_offline.objectives.confidence import confidence
from pact_offline.objectives.pact import pact
from pact_offline.progress import bar
from pact_offline.rows.chat import chat_of
from pact_offline.rows.contexts import Context, contexts_of
from pact_offline.rows.tokenized import tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.scoring.backends import make_scorer
from pact_offline.scoring.scorer import Scored
from pact_offline.settings.stages import AuditSettings, ScoreSettings

_SPREADS = ("difference", "noise", "label_difference", "label_noise")
_SMALLEST = 2e-5  # what another batch changes in fp32


class _Rescored(NamedTuple):
    values: list[np.ndarray]
    labels: list[np.ndarray]


class Spread(NamedTuple):
    """Mean, 99th percentile and maximum of absolute differences."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Audit:
    """A cache against the same contexts scored again.

    Attributes:
        contexts: how many were drawn.
        steps: their response steps.
        scored_by: backend and compute dtype of the new scores.
        difference: of stored and new log-confidences.
        label_difference: of stored and new log-probabilities of the responses' own tokens.
        label_noise: what that may be for no other reason.
        noise: the larger of what the cache's compute dtype and its stored dtype change in the new
            log-confidences; what the difference may be for no other reason.
        pact_difference: change of the mean `pact` of those contexts, relative.
        confidence_difference: KL that the stored values are off by: mean `confidence`.
        ratio: largest of mean and p99 of a difference over those of its noise.
        tolerance: what `ratio` may be.
    """

    contexts: int
    steps: int
    scored_by: str
    difference: Spread
    noise: Spread
    label_difference: Spread
    label_noise: Spread
    pact_difference: float
    confidence_difference: float
    ratio: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.ratio <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        spreads = {name: getattr(self, name)._asdict() for name in _SPREADS}
        return {**asdict(self), **spreads, "is_within": self.is_within}


def audit(
    model: ModelFiles,
    sources: Sequence[str | Path],
    targets_path: Path,
    tokens_path: Path,
    settings: AuditSettings,
    *,
    cache: str | None = None,
) -> Audit:
    """Score a random sample of a cache's contexts again, and compare.

    `cache` is as in `TargetCache.open`.

    Raises:
        TargetsMismatchError, StoreError, InputError: the cache is not of this model and these rows.
    """
    targets = TargetCache.open(targets_path, cache=cache)
    identity = targets.binding.identity
    targets.check_model(model)
    chosen = targets.binding.row_settings.model_copy(
        update={"chat_template": settings.chat_template}
    )
    chat = chat_of(str(model.path), chosen)
    tokens = SafetyTokens.load(tokens_path, chat.tokenizer)
    targets.check_safety_ids(tokens.ids, str(tokens_path))
    targets.check_chat(chat.template_sha256, chat.template_kwargs)
    rows = tokenized_rows(model, sources, chosen, lambda: chat)
    targets.check_rows(rows, chosen)
    random = np.random.default_rng(settings.seed)
    count = min(settings.sample, len(rows))
    drawn = sorted(random.choice(len(rows), count, replace=False).tolist())
    steps = torch.from_numpy(np.concatenate([rows[index].step_numbers for index in drawn]))
    contexts, stored, labels = [], [], []
    for index in drawn:
        full, *only = contexts_of(rows[index], identity.header_ids)
        contexts += [full, *only]
        stored += [*targets[index]]
        labels.append(targets.read_labels([index]))
    dtype_then, load_in = compute_parts(identity.compute_dtype)
    dtypes = dict.fromkeys((settings.dtype, dtype_then))
    scored = {
        dtype: _score(model.path, contexts, identity.safety_ids, settings, dtype, load_in)
        for dtype in dtypes
    }
    truth, then = scored[settings.dtype], scored[dtype_then]
    rounded = [decode(encode(values, identity.stored_dtype)) for values in truth.values]
    difference, noise = _compared(stored, truth.values, then.values, rounded)
    rounded = [encode_labels(values, identity.stored_dtype) for values in truth.labels]
    label_difference, label_noise = _compared(labels, truth.labels, then.labels, rounded)
    ratios = [
        ours / theirs
        for found, expected in ((difference, noise), (label_difference, label_noise))
        for ours, theirs in zip(found[:2], expected[:2], strict=True)
    ]
    pact_difference, confidence_difference = _objectives_off(stored, truth.values, tokens, steps)
    return Audit(
        contexts=len(contexts),
        steps=sum(context.steps for context in contexts),
        scored_by=f"{settings.backend} {compute_name(settings.dtype, load_in)}",
        difference=difference,
        noise=noise,
        label_difference=label_difference,
        label_noise=label_noise,
        pact_difference=pact_difference,
        confidence_difference=confidence_difference,
        ratio=max(ratios),
        tolerance=settings.tolerance,
    )


def _score(
    model: Path,
    contexts: Sequence[Context],
    ids: Sequence[int],
    settings: AuditSettings,
    dtype: str,
    load_in: str | None,
) -> _Rescored:
    """Values in the order of `stored`: of each row the full context's, then all of its turns'."""
    options = ScoreSettings.model_validate(
        {"dtype": dtype, "backend": settings.backend, "load_in": load_in}
    )
    choose_backend(settings.backend, load_in)
    scorer = make_scorer(settings.backend, model, ids, max(len(c.ids) for c in contexts), options)
    found: dict[int, Scored] = {}
    total = sum(len(c.fed) for c in contexts)
    with closing(scorer), bar(f"scoring in {dtype}", total, "tokens") as progress:
        for scored in scorer.score(contexts):
            found[scored.position] = scored
            progress.update(len(contexts[scored.position].fed))
    values: list[np.ndarray] = []
    labels = []
    for index, context in enumerate(contexts):
        one = found[index]
        if context.kind == "full":
            labels.append(one.labels)
        if context.kind == "response_only" and contexts[index - 1].kind == "response_only":
            values[-1] = np.concatenate((values[-1], one.log_confidences))
        else:
            values.append(one.log_confidences)
    return _Rescored(values, labels)


def _compared(
    stored: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    then: Sequence[np.ndarray],
    rounded: Sequence[np.ndarray],
) -> tuple[Spread, Spread]:
    """Difference of stored and new values, and its noise: of another dtype, or of rounding."""
    noises = zip(_spread(then, truth), _spread(rounded, truth), strict=True)
    return _spread(stored, truth), Spread(*(max(*values, _SMALLEST) for values in noises))


def _spread(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Spread:
    ours, theirs = np.concatenate(one), np.concatenate(other)
    gap = np.abs(ours.astype(np.float64) - theirs)
    gap = gap[~(np.isneginf(ours) & np.isneginf(theirs))]
    return Spread(float(gap.mean()), float(np.percentile(gap, 99)), float(gap.max()))


def _tensors(values: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Full and response-only values of rows in pairs."""
    full, response_only = (torch.from_numpy(np.concatenate(values[i::2])) for i in (0, 1))
    return full, response_only


def _objectives_off(
    stored: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    tokens: SafetyTokens,
    steps: torch.Tensor,
) -> tuple[float, float]:
    """What the stored values change: the mean `pact`, relative; the mean `confidence`, from 0."""
    weights = torch.from_numpy(tokens.weights)
    (policy, response_only), (full, only) = _tensors(truth), _tensors(stored)
    right = pact(policy, policy, response_only, weights, steps).mean()
    found = pact(policy, full, only, weights, steps).mean()
    kl = confidence(policy, full, None, weights, steps).mean()
    return float((found - right).abs() / right.clamp(min=1e-12)), float(kl)

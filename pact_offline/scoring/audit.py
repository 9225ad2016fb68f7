"""Is a cache right? A sample of its contexts, scored again another way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pact_offline.cache.encoding import decode, encode
from pact_offline.cache.targets import TargetCache
from pact_offline.models.locate import ModelFiles
from pact_offline.objectives.confidence import confidence
from pact_offline.objectives.pact import pact
from pact_offline.progress import bar
from pact_offline.rows.chat import load_tokenizer, tokenize
from pact_offline.rows.contexts import Context, contexts_of
from pact_offline.rows.read import read_all_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.scoring.backends import make_scorer
from pact_offline.settings.stages import AuditSettings, ScoreSettings

_SMALLEST = 2e-5  # what another batch changes in fp32


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
        noise: the larger of what the cache's compute dtype and its stored dtype change in the new
            log-confidences; what the difference may be for no other reason.
        pact_difference: change of the mean `pact` of those contexts, relative.
        confidence_difference: KL that the stored values are off by: mean `confidence`.
        ratio: largest of mean and p99 of `difference` over those of `noise`.
        tolerance: what `ratio` may be.
    """

    contexts: int
    steps: int
    scored_by: str
    difference: Spread
    noise: Spread
    pact_difference: float
    confidence_difference: float
    ratio: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.ratio <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        spreads = {name: getattr(self, name)._asdict() for name in ("difference", "noise")}
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
    tokenizer = load_tokenizer(str(model.path))
    tokens = SafetyTokens.load(tokens_path, tokenizer)
    targets.check_safety_ids(tokens.ids, str(tokens_path))
    rows = read_all_rows(sources)
    examples = tokenize(rows, tokenizer, targets.binding.max_tokens)
    targets.check_examples(examples, [row.origin for row in rows])
    random = np.random.default_rng(settings.seed)
    count = min(settings.sample, len(examples))
    drawn = sorted(random.choice(len(examples), count, replace=False).tolist())
    pairs = [contexts_of(examples[index], identity.header_ids) for index in drawn]
    contexts = [context for pair in pairs for context in pair]
    stored = [values for index in drawn for values in targets[index]]
    dtypes = dict.fromkeys((settings.dtype, identity.compute_dtype))
    scored = {
        dtype: _score(model.path, contexts, identity.safety_ids, settings, dtype)
        for dtype in dtypes
    }
    truth = scored[settings.dtype]
    difference = _spread(stored, truth)
    rounded = [decode(encode(values, identity.stored_dtype)) for values in truth]
    pairs_of = (_spread(scored[identity.compute_dtype], truth), _spread(rounded, truth))
    noise = Spread(*(max(*values, _SMALLEST) for values in zip(*pairs_of, strict=True)))
    return Audit(
        contexts=len(contexts),
        steps=sum(context.steps for context in contexts),
        scored_by=f"{settings.backend} {settings.dtype}",
        difference=difference,
        noise=noise,
        pact_difference=_pact_difference(stored, truth, tokens),
        confidence_difference=_confidence_difference(stored, truth, tokens),
        ratio=max(difference.mean / noise.mean, difference.p99 / noise.p99),
        tolerance=settings.tolerance,
    )


def _score(
    model: Path,
    contexts: Sequence[Context],
    ids: Sequence[int],
    settings: AuditSettings,
    dtype: str,
) -> list[np.ndarray]:
    options = ScoreSettings.model_validate({"dtype": dtype, "backend": settings.backend})
    scorer = make_scorer(settings.backend, model, ids, max(len(c.ids) for c in contexts), options)
    found: dict[int, np.ndarray] = {}
    total = sum(len(c.ids) for c in contexts)
    with closing(scorer), bar(f"scoring in {dtype}", total, "tokens") as progress:
        for scored in scorer.score(contexts):
            found[scored.position] = scored.log_confidences
            progress.update(len(contexts[scored.position].ids))
    return [found[index] for index in range(len(contexts))]


def _spread(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Spread:
    ours, theirs = np.concatenate(one), np.concatenate(other)
    gap = np.abs(ours.astype(np.float64) - theirs)
    gap = gap[~(np.isneginf(ours) & np.isneginf(theirs))]
    return Spread(float(gap.mean()), float(np.percentile(gap, 99)), float(gap.max()))


def _tensors(values: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full and response-only values, and steps, of contexts in pairs."""
    steps = [torch.arange(len(item)) for item in values[::2]]
    full, response_only = (torch.from_numpy(np.concatenate(values[i::2])) for i in (0, 1))
    return full, response_only, torch.cat(steps)


def _pact_difference(
    stored: Sequence[np.ndarray], truth: Sequence[np.ndarray], tokens: SafetyTokens
) -> float:
    weights = torch.from_numpy(tokens.weights)
    policy, response_only, steps = _tensors(truth)
    right = pact(policy, policy, response_only, weights, steps).mean()
    full, only, _ = _tensors(stored)
    found = pact(policy, full, only, weights, steps).mean()
    return float((found - right).abs() / right.clamp(min=1e-12))


def _confidence_difference(
    stored: Sequence[np.ndarray], truth: Sequence[np.ndarray], tokens: SafetyTokens
) -> float:
    weights = torch.from_numpy(tokens.weights)
    policy, _, steps = _tensors(truth)
    return float(confidence(policy, _tensors(stored)[0], None, weights, steps).mean())

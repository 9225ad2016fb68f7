"""Safety tokens: the ids whose confidence is held, and how much each counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pact_offline.config import TokensSettings, read_text
from pact_offline.conversations import Row, render, require_chat_template, tokenizer_fingerprint
from pact_offline.errors import InputError, ModelError, TargetsMismatchError
from pact_offline.files import write_json
from pact_offline.provenance import provenance

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
Progress = Callable[[int], object]


@dataclass(frozen=True)
class SafetyToken:
    """One id of the set.

    Attributes:
        id: token id.
        text: the token, decoded.
        direction: v, the entry of the unit direction; negative entries weigh 0.
        aligned: mean probability under the aligned model.
        base: mean probability under the base model.
    """

    id: int
    text: str
    direction: float
    aligned: float
    base: float

    @property
    def weight(self) -> float:
        """w = max(v, 0)."""
        return max(self.direction, 0.0)


@dataclass(frozen=True)
class SafetyTokens:
    """The safety ids in ascending order, with weights.

    Attributes:
        tokens: one entry an id.
        tokenizer: fingerprint of the vocabulary the ids belong to.
        settings: how they were found.
        provenance: models, versions and time; does not determine values.
    """

    tokens: tuple[SafetyToken, ...]
    tokenizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def weights(self) -> np.ndarray:
        """float32 [ids], at least 0."""
        return np.array([token.weight for token in self.tokens], dtype=np.float32)

    def table(self) -> str:
        """The tokens for a person, the heaviest first; spaces are shown as a dot."""
        lines = [f"{'token':16} {'id':>7} {'weight':>8} {'aligned':>9} {'base':>9}"]
        for token in sorted(self.tokens, key=lambda token: -token.direction):
            text = token.text.replace(" ", "\u00b7").encode("unicode_escape").decode()
            text = text.replace("\\xb7", "\u00b7")
            lines.append(
                f"{text:16} {token.id:7} {token.weight:8.4f} {token.aligned:9.5f} {token.base:9.5f}"
            )
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write `safety_tokens.json`."""
        tokens = [{**asdict(token), "weight": token.weight} for token in self.tokens]
        write_json(
            path,
            {
                "format_version": FORMAT_VERSION,
                "tokenizer": self.tokenizer,
                "settings": self.settings,
                "provenance": self.provenance,
                "tokens": tokens,
            },
        )

    @classmethod
    def load(cls, path: str | Path, tokenizer: Any | None = None) -> SafetyTokens:
        """Read `safety_tokens.json`; with a tokenizer, refuse a set made for another.

        Raises:
            InputError: not such a file.
            TargetsMismatchError: made for another vocabulary.
        """
        path = Path(path)
        try:
            value = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: expected JSON, found: {error.msg}") from None
        try:
            if value["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path}: format_version: expected {FORMAT_VERSION}, "
                    f"found {value['format_version']!r}"
                )
            names = ("id", "text", "direction", "aligned", "base")
            kinds = (int, str, float, float, float)
            tokens = tuple(
                SafetyToken(*(kind(token[name]) for name, kind in zip(names, kinds, strict=True)))
                for token in value["tokens"]
            )
            result = cls(
                tokens, value["tokenizer"], dict(value["settings"]), dict(value["provenance"])
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: expected safety tokens, found a bad entry: {error}"
            ) from None
        if not tokens or result.ids != sorted(set(result.ids)) or result.ids[0] < 0:
            raise InputError(f"{path}: tokens: expected ascending, distinct ids, found otherwise")
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != result.tokenizer:
            raise TargetsMismatchError(
                f"{path}: expected safety tokens of the tokenizer {tokenizer.name_or_path}, found "
                "those of another vocabulary; run `pact-offline tokens` for this model"
            )
        return result

    @classmethod
    def identify(
        cls,
        aligned: str,
        base: str,
        rows: Sequence[Row],
        settings: TokensSettings,
        progress: Progress | None = None,
    ) -> SafetyTokens:
        """Find the safety tokens of an aligned model and its base (`method.md`, stage 1).

        Args:
            aligned, base: hub ids or paths; same vocabulary.
            rows: refusal pairs.
            settings: mode, sizes and dtype.
            progress: called with the number of pairs done, after each batch of each model.

        Raises:
            ModelError: the vocabularies differ, or no id stands out.
        """
        from pact_offline.conversations import load_tokenizer
        from pact_offline.models import load_model

        aligned_tokenizer, base_tokenizer = load_tokenizer(aligned), load_tokenizer(base)
        require_chat_template(aligned_tokenizer)
        vocabularies = aligned_tokenizer.get_vocab(), base_tokenizer.get_vocab()
        if vocabularies[0] != vocabularies[1]:
            sizes = [len(vocabulary) for vocabulary in vocabularies]
            raise ModelError(
                f"{base}: expected the vocabulary of {aligned} ({sizes[0]} tokens), "
                f"found another ({sizes[1]} tokens)"
            )
        pairs = rows[: settings.examples]
        report = progress or (lambda count: None)
        sequences = [
            _teacher_forced(pairs, aligned_tokenizer, settings, _aligned_prompt),
            _teacher_forced(pairs, base_tokenizer, settings, _base_prompt),
        ]
        if settings.mode == "p_diff":
            means = []
            for name, items in zip((aligned, base), sequences, strict=True):
                model = load_model(name, settings.dtype)
                means.append(_mean_probabilities(model, items, settings.batch_size, report))
                del model  # one model in memory at a time
            _same_width(means, aligned, base)
            direction = means[0] - means[1]
        else:
            models = [load_model(name, settings.dtype) for name in (aligned, base)]
            means, direction = _mean_log_ratio(models, sequences, settings.batch_size, report)
        is_candidate = _is_word_in(aligned_tokenizer) if settings.words_only else None
        vector = safety_direction(direction, means[0], settings.top_k, is_candidate)
        ids = np.flatnonzero(vector)
        if not len(ids):
            raise ModelError(
                f"{base}: expected a base model that differs from {aligned}, found the same "
                "confidences on every token"
            )
        tokens = tuple(
            SafetyToken(
                int(i),
                aligned_tokenizer.decode([int(i)]),
                float(vector[i]),
                float(means[0][i]),
                float(means[1][i]),
            )
            for i in ids
        )
        return cls(
            tokens,
            tokenizer_fingerprint(aligned_tokenizer),
            {**settings.model_dump(exclude={"batch_size"}), "pairs": len(pairs)},
            provenance(aligned=aligned, base=base),
        )


def safety_direction(
    direction: np.ndarray,
    aligned: np.ndarray,
    top_k: int,
    is_candidate: Callable[[int], bool] | None = None,
) -> np.ndarray:
    """The unit direction v over the vocabulary.

    Args:
        direction: float64 [vocabulary], d averaged over pairs.
        aligned: float64 [vocabulary], the aligned model's mean probabilities.
        top_k: ids kept, those with the largest mean probability.
        is_candidate: which ids may be kept; None: all.

    Returns:
        float64 [vocabulary]; zero outside the kept ids.
    """
    vector = np.zeros_like(direction)
    ranked = map(int, np.argsort(-aligned, kind="stable"))
    kept = np.array([*islice(filter(is_candidate or (lambda _: True), ranked), top_k)], dtype=int)
    kept = kept[np.abs(direction[kept]) > 1e-9]
    values = direction[kept]
    if len(values) > 1:
        values = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    vector[kept] = values
    return np.asarray(vector / (np.linalg.norm(vector) + 1e-6))


def _is_word_in(tokenizer: Any) -> Callable[[int], bool]:
    """Tells ids with a letter in their text from punctuation, numbers and special tokens."""
    special = set(tokenizer.all_special_ids)
    return lambda i: i not in special and any(map(str.isalpha, tokenizer.decode([i])))


def _aligned_prompt(row: Row, tokenizer: Any) -> list[int]:
    return render(tokenizer, row.prompt, generation_prompt=True)


def _base_prompt(row: Row, tokenizer: Any) -> list[int]:
    turns = [message["content"] for message in row.prompt if message["role"] == "user"]
    text = "".join(f"User: {turn}\n\n" for turn in turns) + "Assistant: "
    return [int(token) for token in tokenizer(text).input_ids]


@dataclass(frozen=True)
class _TeacherForced:
    ids: list[int]
    response_start: int


def _teacher_forced(
    rows: Sequence[Row],
    tokenizer: Any,
    settings: TokensSettings,
    prompt_of: Callable[[Row, Any], list[int]],
) -> list[_TeacherForced]:
    items = []
    for row in rows:
        response = tokenizer(row.response, add_special_tokens=False).input_ids
        prompt = prompt_of(row, tokenizer)
        items.append(_TeacherForced([*prompt, *response[: settings.response_tokens]], len(prompt)))
    return items


def _step_log_probabilities(
    model: Any, items: Sequence[_TeacherForced], batch_size: int
) -> Iterator[list[torch.Tensor]]:
    """For each batch, each item's log-probabilities at its response steps, fp32 [R, vocabulary]."""
    from pact_offline.models import response_logits

    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        contexts = [(item.ids[:-1], item.response_start) for item in batch]
        yield [logits.float().log_softmax(-1) for logits in response_logits(model, contexts)]


def _mean_probabilities(
    model: Any, items: Sequence[_TeacherForced], batch_size: int, progress: Progress
) -> np.ndarray:
    total: torch.Tensor | None = None
    for batch in _step_log_probabilities(model, items, batch_size):
        for log_probabilities in batch:
            mean = log_probabilities.exp().mean(dim=0).double()
            total = mean if total is None else total + mean
        progress(len(batch))
    assert total is not None
    return np.asarray((total / len(items)).cpu().numpy())


def _mean_log_ratio(
    models: Sequence[Any],
    sequences: Sequence[Sequence[_TeacherForced]],
    batch_size: int,
    progress: Progress,
) -> tuple[list[np.ndarray], np.ndarray]:
    totals: list[Any] = [0, 0, 0]
    batches = zip(
        *(
            _step_log_probabilities(model, items, batch_size)
            for model, items in zip(models, sequences, strict=True)
        ),
        strict=True,
    )
    for aligned_batch, base_batch in batches:
        for aligned, base in zip(aligned_batch, base_batch, strict=True):
            parts = (aligned.exp(), base.exp(), aligned.exp() * (base - aligned))
            totals = [
                total + part.mean(dim=0).double() for total, part in zip(totals, parts, strict=True)
            ]
        progress(2 * len(aligned_batch))
    means = [np.asarray((total / len(sequences[0])).cpu().numpy()) for total in totals]
    return means[:2], means[2]


def _same_width(means: Sequence[np.ndarray], aligned: str, base: str) -> None:
    if means[0].shape != means[1].shape:
        raise ModelError(
            f"{base}: expected {means[0].shape[0]} logits as {aligned} has, "
            f"found {means[1].shape[0]}"
        )

"""Safety tokens: the ids whose confidence is held, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pact_offline.config import TokensSettings, read_json
from pact_offline.conversations import Row, render, require_chat_template, tokenizer_fingerprint
from pact_offline.errors import InputError, ModelError, TargetsMismatchError
from pact_offline.files import write_json
from pact_offline.provenance import provenance

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
Progress = Callable[[int], object]


def visible(text: str) -> str:
    """A token's text on one line, with its spaces shown as dots."""
    return text.replace(" ", "\u00b7").encode("unicode_escape").decode().replace("\\xb7", "\u00b7")


@dataclass(frozen=True)
class SafetyToken:
    """One id of the set.

    Attributes:
        id: token id.
        text: the token, decoded.
        direction: v, the entry of the unit direction; negative entries weigh 0.
        aligned: mean probability under the aligned model; None in a hand-made set.
        base: mean probability under the base model; None in a hand-made set.
    """

    id: int
    text: str
    direction: float
    aligned: float | None = None
    base: float | None = None

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
            means = ("-" if m is None else f"{m:.5f}" for m in (token.aligned, token.base))
            columns = " ".join(f"{mean:>9}" for mean in means)
            lines.append(f"{visible(token.text):16} {token.id:7} {token.weight:8.4f} {columns}")
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
        value = read_json(path)
        try:
            if value["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path}: format_version: expected {FORMAT_VERSION}, "
                    f"found {value['format_version']!r}"
                )
            tokens = tuple(
                SafetyToken(
                    int(token["id"]),
                    str(token["text"]),
                    float(token["direction"]),
                    *(None if m is None else float(m) for m in (token["aligned"], token["base"])),
                )
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
    def from_list(cls, path: Path, model: str) -> SafetyTokens:
        """Read a hand-made list: JSON, each entry a word, an id, or [word or id, weight].

        A word is exactly one token, its leading space included: " can" is not "can". An entry
        without a weight weighs 1; one of weight 0 counts in the softmaxes of `pact` alone.

        Args:
            path: the list.
            model: hub id or path of the model whose tokenizer the words are read with.

        Raises:
            InputError: names the entry, what was expected and what was found.
        """
        from pact_offline.conversations import load_tokenizer

        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: expected a list of words or ids, found {entries!r:.40}")
        tokenizer = load_tokenizer(model)
        weights: dict[int, float] = {}
        for index, entry in enumerate(entries):
            place = f"{path}: entry {index + 1}"
            word, weight = entry if isinstance(entry, list) and len(entry) == 2 else (entry, 1)
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (is_number and 0 <= weight < math.inf):
                raise InputError(f"{place}: expected a weight of 0 or more, found {weight!r:.40}")
            id_ = _only_token(word, tokenizer, place)
            if id_ in weights:
                raise InputError(f"{place}: expected each token once, found id {id_} again")
            weights[id_] = float(weight)
        return cls(
            tuple(SafetyToken(i, tokenizer.decode([i]), weights[i]) for i in sorted(weights)),
            tokenizer_fingerprint(tokenizer),
            {"mode": "list"},
            provenance(aligned=model),
        )

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
        seen_aligned = _teacher_forced(pairs, aligned_tokenizer, settings, _aligned_prompt)
        seen_base = _teacher_forced(pairs, base_tokenizer, settings, _base_prompt)
        read = partial(_read, batch_size=settings.batch_size, progress=progress or (lambda n: None))
        model = load_model(aligned, settings.dtype)
        aligned_mean = read(model, seen_aligned).mean
        is_candidate = _is_word_in(aligned_tokenizer) if settings.words_only else None
        kept = likeliest(aligned_mean, settings.top_k, is_candidate)
        is_ratio = settings.mode == "pref_logratio"
        ours = read(model, seen_aligned, kept) if is_ratio else None
        del model  # one model in memory at a time
        theirs = read(load_model(base, settings.dtype), seen_base, kept if is_ratio else None)
        if aligned_mean.shape != theirs.mean.shape:
            raise ModelError(
                f"{base}: expected {len(aligned_mean)} logits as {aligned} has, "
                f"found {len(theirs.mean)}"
            )
        if ours is not None:
            difference = _mean_log_ratio(ours, theirs)
        else:
            difference = (aligned_mean - theirs.mean)[kept]
        vector = safety_direction(difference)
        is_safety = vector != 0
        if not is_safety.any():
            raise ModelError(
                f"{base}: expected a base model that differs from {aligned}, found the same "
                "confidences on every token"
            )
        found = sorted(zip(kept[is_safety].tolist(), vector[is_safety].tolist(), strict=True))
        tokens = tuple(
            SafetyToken(
                id_,
                aligned_tokenizer.decode([id_]),
                value,
                float(aligned_mean[id_]),
                float(theirs.mean[id_]),
            )
            for id_, value in found
        )
        return cls(
            tokens,
            tokenizer_fingerprint(aligned_tokenizer),
            {**settings.model_dump(exclude={"batch_size"}), "pairs": len(pairs)},
            provenance(aligned=aligned, base=base),
        )


def likeliest(
    probabilities: np.ndarray, top_k: int, is_candidate: Callable[[int], bool] | None = None
) -> np.ndarray:
    """Ids of the largest probabilities.

    Args:
        probabilities: float64 [vocabulary], the aligned model's means.
        top_k: how many.
        is_candidate: which ids may be among them; None: all.

    Returns:
        int64 [at most top_k], the likeliest first.
    """
    ranked = map(int, np.argsort(-probabilities, kind="stable"))
    chosen = islice(filter(is_candidate or (lambda _: True), ranked), top_k)
    return np.array([*chosen], dtype=np.int64)


def safety_direction(difference: np.ndarray) -> np.ndarray:
    """The unit direction v over the kept ids.

    Args:
        difference: float64 [ids], d averaged over pairs.

    Returns:
        float64 [ids]; 0 where the models do not differ: such an id is no safety token.
    """
    vector = np.zeros_like(difference)
    differs = np.abs(difference) > 1e-9
    values = difference[differs]
    if len(values) > 1:
        values = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    vector[differs] = values
    return np.asarray(vector / (np.linalg.norm(vector) + 1e-6))


def _only_token(word: Any, tokenizer: Any, place: str) -> int:
    """The id that a word or an id in a hand-made list stands for."""
    if isinstance(word, int) and not isinstance(word, bool):
        if not 0 <= word < len(tokenizer):
            raise InputError(f"{place}: expected an id below {len(tokenizer)}, found {word}")
        return word
    if not isinstance(word, str) or not word:
        raise InputError(f"{place}: expected a word, an id, or a pair, found {word!r:.40}")
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise InputError(
            f"{place}: expected a word of one token, found {word!r} in {len(ids)} pieces: {pieces}"
        )
    return int(ids[0])


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


class _Reading(NamedTuple):
    """What a model gave: mean probabilities, float64 [vocabulary]; each pair's steps, if asked."""

    mean: np.ndarray
    steps: list[np.ndarray]  # log-probabilities at some ids, float64 [R, ids]


def _read(
    model: Any,
    items: Sequence[_TeacherForced],
    at: np.ndarray | None = None,
    *,
    batch_size: int,
    progress: Progress,
) -> _Reading:
    total: torch.Tensor | None = None
    steps = []
    for batch in _step_log_probabilities(model, items, batch_size):
        for log_probabilities in batch:
            mean = log_probabilities.exp().mean(dim=0).double()
            total = mean if total is None else total + mean
            if at is not None:
                steps.append(log_probabilities[:, at.tolist()].double().cpu().numpy())
        progress(len(batch))
    assert total is not None
    return _Reading(np.asarray((total / len(items)).cpu().numpy()), steps)


def _mean_log_ratio(aligned: _Reading, base: _Reading) -> np.ndarray:
    """d of the mode pref_logratio: p_aligned * (log p_base - log p_aligned), averaged; [ids]."""
    means = [
        (np.exp(ours) * (theirs - ours)).mean(axis=0)
        for ours, theirs in zip(aligned.steps, base.steps, strict=True)
    ]
    return np.asarray(np.mean(means, axis=0))

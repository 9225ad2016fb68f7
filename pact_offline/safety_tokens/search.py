"""Finding safety tokens: what tells an aligned model from its base on refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pact_offline.errors import InputError, ModelError
from pact_offline.made_from import MadeFrom, rows_sha256
from pact_offline.provenance import provenance
from pact_offline.references import locate_reference
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.positions import Positions
from pact_offline.rows.row import THOUGHTS, Row, texts
from pact_offline.rows.spans import find_spans
from pact_offline.rows.tokenizer import load_tokenizer, tokenizer_fingerprint
from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens
from pact_offline.settings.stages import TokensSettings

if TYPE_CHECKING:
    import torch


Progress = Callable[[int], object]


def find_safety_tokens(
    aligned: str,
    base: str,
    rows: Sequence[Row],
    settings: TokensSettings,
    progress: Progress | None = None,
) -> SafetyTokens:
    """Find the safety tokens of an aligned model and its base (arXiv 2603.07445, stage 1).

    Args:
        aligned, base: hub ids or paths; same vocabulary.
        rows: refusal pairs.
        settings: mode, sizes and dtype.
        progress: called with the number of pairs done, after each batch of each model.

    Raises:
        ModelError: the vocabularies differ, or no id stands out.
    """
    from pact_offline.models.load import load_model

    files, base_files = locate_reference(aligned), locate_reference(base)
    if files.identity == base_files.identity:
        raise ModelError(
            f"{base}: expected a base model that differs from {aligned}, found the same"
        )
    chat = chat_of(str(files.path), settings)
    tokenizer, base_tokenizer = chat.tokenizer, load_tokenizer(str(base_files.path))
    vocabulary, base_vocabulary = tokenizer.get_vocab(), base_tokenizer.get_vocab()
    if vocabulary != base_vocabulary:
        raise ModelError(
            f"{base}: expected the vocabulary of {aligned} ({len(vocabulary)} tokens), found "
            f"another ({len(base_vocabulary)} tokens)"
        )
    pairs = rows[: settings.examples]
    seen_aligned = _as_trained(pairs, chat, settings.response_tokens)
    seen_base = _as_continued(pairs, seen_aligned, base_tokenizer)
    for own, seen in ((files, seen_aligned), (base_files, seen_base)):
        positions = Positions(own.path)
        for row, one in zip(pairs, seen, strict=True):
            positions.require(one.ids, row.origin, more=0)
    read = partial(_read, batch_size=settings.batch_size, progress=progress or (lambda n: None))
    model = load_model(str(files.path), settings.dtype)
    aligned_mean = read(model, seen_aligned).mean
    is_candidate = _is_word_in(tokenizer) if settings.words_only else None
    kept = likeliest(aligned_mean, settings.top_k, is_candidate)
    is_ratio = settings.mode == "pref_logratio"
    ours = read(model, seen_aligned, kept) if is_ratio else None
    del model  # one model in memory at a time
    base_model = load_model(str(base_files.path), settings.dtype)
    theirs = read(base_model, seen_base, kept if is_ratio else None)
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
    means = aligned_mean.tolist(), theirs.mean.tolist()
    tokens = tuple(
        SafetyToken(i, tokenizer.decode([i]), value, *(mean[i] for mean in means))
        for i, value in found
    )
    fingerprint = tokenizer_fingerprint(tokenizer)
    how = settings.model_dump(exclude={"batch_size", "chat_template", "columns"})
    return SafetyTokens(
        tokens,
        fingerprint,
        {**how, "pairs": len(pairs)},
        provenance(aligned=aligned, base=base),
        MadeFrom(
            models={"aligned": files.identity, "base": base_files.identity},
            rows={"refusals": rows_sha256(pairs)},
            tokenizer=fingerprint,
            template=chat.template_sha256,
            settings=how,
        ),
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


def _is_word_in(tokenizer: Any) -> Callable[[int], bool]:
    """Tells ids with a letter in their text from punctuation, numbers and special tokens."""
    special = set(tokenizer.all_special_ids)
    return lambda i: i not in special and any(map(str.isalpha, tokenizer.decode([i])))


def _as_trained(rows: Sequence[Row], chat: Chat, longest: int) -> list[_TeacherForced]:
    """Refusals where training reads them: each row's last answer, from its own text on.

    The end of turn is left out, as the base model's continuation has none.
    """
    for row in rows:
        if not row.response or len(row.messages) - 1 in row.not_trained:
            raise InputError(
                f"{row.origin}: expected a refusal as the last message, in words and to learn, "
                "found none"
            )
    found = []
    for row, spans in zip(rows, find_spans(chat, rows, "last"), strict=True):
        if isinstance(spans, InputError):
            raise spans
        turn = spans.turns[-1]
        thought = "".join(str(row.messages[-1].get(key) or "") for key in THOUGHTS)
        answer = chat.ids_of(thought + (row.response or ""))
        end = min(turn.end, turn.first + len(answer), turn.first + longest)
        found.append(_TeacherForced(spans.ids[:end], turn.first))
    return found


def _as_continued(
    rows: Sequence[Row], aligned: Sequence[_TeacherForced], tokenizer: Any
) -> list[_TeacherForced]:
    """The same tokens for a model without a chat template: turns are named in plain text.

    Of a conversation the user's turns are read, as by the published script.
    """
    found = []
    for row, seen in zip(rows, aligned, strict=True):
        text = "".join(f"User: {turn}\n\n" for turn in texts(row.prompt, "user")) + "Assistant: "
        prompt = [int(token) for token in tokenizer(text).input_ids]
        response = seen.ids[seen.response_start :]  # both have one vocabulary
        found.append(_TeacherForced([*prompt, *response], len(prompt)))
    return found


@dataclass(frozen=True)
class _TeacherForced:
    ids: list[int]
    response_start: int


def _step_log_probabilities(
    model: Any, items: Sequence[_TeacherForced], batch_size: int
) -> Iterator[list[torch.Tensor]]:
    """For each batch, each item's log-probabilities at its response steps, fp32 [R, vocabulary]."""
    from pact_offline.models.log_confidences import response_logits

    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        contexts = [(item.ids, [(item.response_start, len(item.ids))]) for item in batch]
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

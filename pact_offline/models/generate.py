"""Greedy answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from pact_offline.errors import InputError, ModelError
from pact_offline.models.ends import ends_of_answers
from pact_offline.models.load import without_adapter
from pact_offline.models.log_confidences import reads_padding


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end_of_turn: int | None = None,
    avoid: Sequence[str] = (),
    avoid_first: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
    known: Mapping[int, str] | None = None,
    made: Callable[[dict[int, str]], object] | None = None,
) -> list[str]:
    """Greedy answers to prompts, in their order.

    Of the model's own generation config count the ends and the penalty of repetition, as in
    `VllmAnswers`. The rest is for other ways to answer, such as beams, or would stop this one.

    Args:
        model, tokenizer: a chat model.
        prompts: token ids of each, from `Chat.prompt_ids`.
        max_new_tokens: longest answer; it also ends where a table of positions does.
        batch_size: prompts at once; those of like length go together.
        end_of_turn: one more id that ends an answer, beside those of the model's generation config
            and the tokenizer's.
        avoid: texts that no answer may contain.
        avoid_first: tokens that no answer may begin with.
        progress: called with the number of prompts done; known ones do not count.
        known: answers by the number of their prompt; a batch of such is not asked.
        made: called with the answers of a batch that was asked, by number.

    Returns:
        the answers' text without special tokens.

    Raises:
        InputError: a prompt leaves no position for an answer.
        ModelError: the model's penalty of repetition is none, or its logits are no numbers.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id or 0
    batch_size = 1 if reads_padding(model) else batch_size
    own = model.generation_config
    most = _positions(model)
    name = model.config._name_or_path
    ends = ends_of_answers(name, own.eos_token_id, tokenizer.eos_token_id, end_of_turn)
    penalty = repetition_penalty(own, name)
    avoided = [tokenizer(text, add_special_tokens=False).input_ids for text in avoid]
    avoided_first = [i for i in tokenizer.convert_tokens_to_ids(list(avoid_first)) if i is not None]
    # A prompt whose answer ends early is asked alone, so that it ends no other's.
    is_short = [most is not None and len(ids) + max_new_tokens > most for ids in prompts]
    others = [i for i in order if not is_short[i]]
    batches = [[i] for i in order if is_short[i]]
    batches += [others[at : at + batch_size] for at in range(0, len(others), batch_size)]
    for batch in batches:
        if known and all(i in known for i in batch):
            for i in batch:
                answers[i] = known[i]
            continue
        width = max(len(prompts[i]) for i in batch)
        longest = max_new_tokens if most is None else min(max_new_tokens, most - width)
        if longest < 1:
            raise InputError(f"expected prompts of less than {most} tokens, found {width}")
        ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        config = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=ends or None,
            repetition_penalty=penalty,
            bad_words_ids=avoided or None,
            begin_suppress_tokens=avoided_first or None,
        )
        with _in_place_of_own(model, config), _head_of_whole_states(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=[_require_numbers(name)],
            )
        for row, i in enumerate(batch):
            answer = output[row, width:].tolist()
            stop = next((at for at, token in enumerate(answer) if token in ends), len(answer))
            answers[i] = tokenizer.decode(answer[:stop], skip_special_tokens=True).strip()
        if made is not None:
            made({i: answers[i] for i in batch})
        if progress is not None:
            progress(sum(i not in (known or {}) for i in batch))
    return answers


def repetition_penalty(config: Any, model: str) -> float:
    """What a generation config asks for; 1 where it asks for nothing.

    Raises:
        ModelError: it is no number above 0.
    """
    found = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if not isinstance(found, int | float) or not found > 0:
        raise ModelError(
            f"{model}: generation config: repetition_penalty: expected a number above 0, found "
            f"{found!r:.60}"
        )
    return float(found)


def _require_numbers(model: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Refuse NaN at the first step of a batch, where the largest of them would be an answer."""
    is_first = True

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal is_first
        if is_first and scores.isnan().any():
            raise ModelError(
                f"{model}: expected logits that are numbers, found NaN: its weights are broken, "
                "or too large for --dtype"
            )
        is_first = False
        return scores

    return look


@contextmanager
def _in_place_of_own(model: Any, config: Any) -> Iterator[None]:
    """transformers takes what a config leaves open from the model's own."""
    inner = without_adapter(model)
    own, inner.generation_config = inner.generation_config, config
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _head_of_whole_states(model: Any) -> Iterator[None]:
    """On a CPU, torch multiplies a slice of each prompt's states by a copy of the head for each."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, given: tuple(one.contiguous() for one in given))
    try:
        yield
    finally:
        hook.remove()


def _positions(model: Any) -> int | None:
    """How many positions a model has a table of, as GPT-2 does; None where it computes them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (part for part in model.modules() if isinstance(part, torch.nn.Embedding))
    sizes = {table.num_embeddings for table in tables if table is not words}
    return most if most is not None and sizes & {most, most + 2} else None  # 2 more: OPT

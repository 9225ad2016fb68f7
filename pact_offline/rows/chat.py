"""From conversations to token ids, by a tokenizer's chat template."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import InputError, ModelError, first_line
from pact_offline.models.locate import looks_like_path, require_model, why_not_loaded
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.read import Message, Row


def load_tokenizer(model: str) -> Any:
    """A model's tokenizer, with a chat template.

    Raises:
        MissingFileError: no such path or hub model.
        ModelError: there is no tokenizer, or it has no chat template.
    """
    from transformers import AutoTokenizer

    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        tokenizer("Hello")  # odd values of its files show on first use
    except Exception as error:
        reason = why_not_loaded(error, Path(model) if looks_like_path(model) else None)
        raise ModelError(f"{model}: no tokenizer could be loaded: {reason}") from None
    return tokenizer


def require_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{tokenizer.name_or_path}: expected a tokenizer with a chat template, found none; "
            "use the chat model's own tokenizer, or add chat_template.jinja to its directory"
        )


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template."""
    return render_all(tokenizer, [messages], generation_prompt=generation_prompt)[0]


def _at_template_date(form: str) -> str:
    """The day in place of today's, for templates that write the date: a context is no day's."""
    return datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC).strftime(form)


def render_all(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    generation_prompt: bool,
    names: Sequence[str] = (),
) -> list[list[int]]:
    """`render` of many conversations, tokenized at once.

    Raises:
        InputError: the template refuses a conversation; says which, by `names`.
    """
    texts = []
    for position, messages in enumerate(conversations):
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                strftime_now=_at_template_date,
            )
        except Exception as error:  # a template may raise anything
            place = names[position] if names else tokenizer.name_or_path
            raise InputError(
                f"{place}: expected a conversation that the chat template takes, found: "
                f"{first_line(error)}"
            ) from None
        texts.append(text)
    return [[*ids] for ids in tokenizer(texts, add_special_tokens=False).input_ids] if texts else []


def header_ids(tokenizer: Any) -> list[int]:
    """What the chat template's generation prompt adds: the assistant header.

    Raises:
        ModelError: the template adds nothing, so a response cannot be told from its prompt.
    """
    require_chat_template(tokenizer)
    messages = [{"role": "user", "content": "Hello"}]
    without = render(tokenizer, messages, generation_prompt=False)
    with_header = render(tokenizer, messages, generation_prompt=True)
    header = with_header[len(without) :]
    if with_header[: len(without)] != without or not header:
        raise ModelError(
            f"{tokenizer.name_or_path}: expected a chat template whose generation prompt adds an "
            "assistant header at the end, found none"
        )
    return header


def tokenize(rows: Sequence[Row], tokenizer: Any, max_tokens: int) -> list[TokenizedExample]:
    """Tokenize rows by the chat template, cut at `max_tokens`.

    Raises:
        ModelError: no usable chat template.
        InputError: a row has no response token left.
    """
    require_chat_template(tokenizer)
    answers = [{"role": "assistant", "content": row.response or ""} for row in rows]
    names = [row.origin for row in rows]
    prompts = render_all(
        tokenizer, [row.prompt for row in rows], generation_prompt=True, names=names
    )
    wholes = render_all(
        tokenizer,
        [(*row.prompt, answer) for row, answer in zip(rows, answers, strict=True)],
        generation_prompt=False,
        names=names,
    )
    examples = []
    for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"{row.origin}: expected the conversation's tokens to begin with its prompt's, "
                "found that the chat template renders them otherwise"
            )
        if len(prompt) >= min(len(whole), max_tokens):
            raise InputError(
                f"{row.origin}: expected a response within {max_tokens} tokens, found a prompt of "
                f"{len(prompt)}; raise --max-tokens or shorten the row"
            )
        ids = np.asarray(whole[:max_tokens], dtype=np.int32)
        examples.append(TokenizedExample(ids, len(prompt), len(whole) > max_tokens))
    return examples


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (every token's text and id), 64 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps(vocabulary, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

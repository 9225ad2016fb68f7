"""Rows of chat data, and the token contexts they become.

A row comes in one of three forms:

- ``{"messages": [{"role": ..., "content": ...}, ..., {"role": "assistant", "content": ...}]}``
- ``{"prompt": ..., "response": ...}``
- ``{"instruction": ..., "input": ..., "output": ...}`` (the user turn is instruction, one space,
  input; ``input`` may be missing or empty)

Rows are read from JSON-lines files, Parquet files, or a hub dataset (``hub:NAME`` or
``hub:NAME:SPLIT``).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pact_offline.config import read_text
from pact_offline.errors import InputError, MissingFileError, ModelError
from pact_offline.hub import first_line, require_model

Message = dict[str, str]
ContextKind = Literal["full", "response_only"]
CONTEXT_KINDS: tuple[ContextKind, ...] = ("full", "response_only")


@dataclass(frozen=True)
class Row:
    """One conversation; the last message, if the assistant's, is the response.

    Attributes:
        prompt: messages before the response.
        response: the assistant's text, or None in a file of prompts.
        origin: file and line, for messages.
    """

    prompt: tuple[Message, ...]
    response: str | None
    origin: str


@dataclass(frozen=True)
class TokenizedExample:
    """A row as the policy sees it.

    Attributes:
        ids: int32 [tokens], prompt and response.
        response_start: index of the first response token; at least 1.
    """

    ids: np.ndarray
    response_start: int

    @property
    def steps(self) -> int:
        """Response steps: step t predicts response token t."""
        return len(self.ids) - self.response_start


@dataclass(frozen=True)
class Context:
    """What the reference model sees, and the steps it is read at.

    Attributes:
        kind: with the prompt ("full") or with the assistant header alone ("response_only").
        ids: int32 [tokens]; the last response token is not fed.
        response_start: number of tokens before the first response token; step t is read at
            position response_start - 1 + t.
    """

    kind: ContextKind
    ids: np.ndarray
    response_start: int

    @property
    def steps(self) -> int:
        return len(self.ids) - self.response_start + 1

    @property
    def key(self) -> str:
        """32 hex digits that name this context in every store.

        The first 16 bytes of SHA-256 over ``pact-offline context 1\\n``, the kind, a newline,
        and response_start and the ids as little-endian int32.
        """
        numbers = np.concatenate(([self.response_start], self.ids)).astype("<i4")
        digest = hashlib.sha256(f"pact-offline context 1\n{self.kind}\n".encode())
        digest.update(numbers.tobytes())
        return digest.hexdigest()[:32]


def full_context(example: TokenizedExample) -> Context:
    """The context with the prompt."""
    return Context("full", example.ids[:-1], example.response_start)


def response_only_context(example: TokenizedExample, header: Sequence[int]) -> Context:
    """The context without the prompt: assistant header and response."""
    response = example.ids[example.response_start : -1]
    ids = np.concatenate((np.asarray(header, dtype=np.int32), response))
    return Context("response_only", ids, len(header))


def contexts_of(example: TokenizedExample, header: Sequence[int]) -> tuple[Context, Context]:
    """Both contexts of an example, in the order of CONTEXT_KINDS."""
    return full_context(example), response_only_context(example, header)


def _text(value: Any, key: str, origin: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{origin}: {key}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: {key}: expected Unicode text, found half a surrogate pair at character "
            f"{error.start}"
        ) from None
    return value


def _parse_messages(value: Any, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{origin}: messages: expected a list of messages, found {value!r:.60}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(
                f"{origin}: messages[{index}]: expected role and content, found {message!r:.60}"
            )
        parts = {
            key: _text(message.get(key), f"messages[{index}].{key}", origin)
            for key in ("role", "content")
        }
        messages.append(parts)
    return tuple(messages)


def parse_row(value: Any, origin: str, *, needs_response: bool = True) -> Row:
    """Read one row in any of the three forms.

    Raises:
        InputError: names `origin`, the key, what was expected and what was found.
    """
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected an object, found {type(value).__name__}")
    response: str | None
    if "messages" in value:
        messages = _parse_messages(value["messages"], origin)
        prompt, response = messages, None
        if messages[-1]["role"] == "assistant":
            prompt, response = messages[:-1], messages[-1]["content"]
        response_key = "messages"
    elif "prompt" in value:
        text = _text(value["prompt"], "prompt", origin)
        prompt, response_key = ({"role": "user", "content": text},), "response"
        response = value.get("response")
    elif "instruction" in value:
        text = _text(value["instruction"], "instruction", origin)
        if extra := _text(value.get("input") or "", "input", origin):
            text = f"{text} {extra}"
        prompt, response_key = ({"role": "user", "content": text},), "output"
        response = value.get("output")
    else:
        raise InputError(
            f"{origin}: expected the key messages, prompt or instruction, "
            f"found {', '.join(map(str, value)) or 'no key'}"
        )
    if not prompt or not any(message["content"].strip() for message in prompt):
        raise InputError(f"{origin}: expected a prompt, found none")
    if response is not None:
        response = _text(response, response_key, origin)
    if needs_response and not (response and response.strip()):
        raise InputError(f"{origin}: {response_key}: expected a response, found none")
    return Row(prompt, response or None, origin)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: expected one JSON object a line, found an empty file")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except RecursionError:
            raise InputError(f"{path}:{number}: expected a row, found deeply nested JSON") from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: expected a JSON object, found: {error.msg} at column "
                f"{error.colno}"
            ) from None


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        if source.startswith("hub:"):
            name, _, split = source.removeprefix("hub:").partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
        else:
            rows = datasets.Dataset.from_parquet(source)
    except Exception as error:
        raise InputError(f"{source}: cannot be read as a dataset: {first_line(error)}") from None
    for index, row in enumerate(rows):
        yield f"{source}:{index + 1}", {key: value for key, value in row.items() if value}


def read_rows(source: str | Path, *, needs_response: bool = True) -> list[Row]:
    """All rows of one source, in order.

    Raises:
        MissingFileError, InputError: names file and line.
    """
    name = str(source)
    if name.startswith("hub:"):
        values = _dataset_rows(name)
    elif Path(name).suffix == ".parquet":
        if not Path(name).is_file():
            raise MissingFileError(f"{name}: no such file")
        values = _dataset_rows(name)
    else:
        values = _json_lines(Path(name))
    return [parse_row(value, origin, needs_response=needs_response) for origin, value in values]


def read_all_rows(sources: Iterable[str | Path], *, needs_response: bool = True) -> list[Row]:
    """Rows of several sources, one after the other."""
    return [row for source in sources for row in read_rows(source, needs_response=needs_response)]


def load_tokenizer(model: str) -> Any:
    """A model's tokenizer, with a chat template.

    Raises:
        MissingFileError: no such path or hub model.
        ModelError: there is no tokenizer, or it has no chat template.
    """
    from transformers import AutoTokenizer

    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise ModelError(f"{model}: no tokenizer could be loaded: {first_line(error)}") from None
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
        examples.append(
            TokenizedExample(np.asarray(whole[:max_tokens], dtype=np.int32), len(prompt))
        )
    return examples


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (every token's text and id), 64 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps(vocabulary, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

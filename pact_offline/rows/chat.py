"""Conversations rendered by a tokenizer's chat template: the one way for every stage."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pact_offline.errors import InputError, ModelError, first_line
from pact_offline.files import read_json, read_text
from pact_offline.models.ends import ends_of_answers
from pact_offline.rows.dropped import MARKER, MERGE, can_merge, left_out
from pact_offline.rows.generation_prompt import (
    ANSWER,
    QUESTION,
    GenerationPrompt,
    common_start,
    generation_prompt_of,
)
from pact_offline.rows.row import Message, Row
from pact_offline.rows.tokenizer import load_tokenizer, tokenizer_fingerprint
from pact_offline.rows.values import shown
from pact_offline.settings.stages import ChatSettings


class Conversation(NamedTuple):
    """What a chat template renders."""

    messages: Sequence[Message]
    tools: tuple[Any, ...] | None = None


class Chat:
    """A tokenizer, its chat template, and what the template is told beside a conversation."""

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        assistant_header: str | None = None,
    ) -> None:
        """Take a tokenizer as it is.

        Args:
            tokenizer: of transformers, with a chat template.
            template_kwargs: variables of the template, such as enable_thinking.
            assistant_header: in place of what `header_ids` finds.

        Raises:
            ModelError: there is no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"{tokenizer.name_or_path}: expected a tokenizer with a chat template, found none; "
                "use the chat model's own tokenizer, or --chat-template FILE"
            )
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self.assistant_header = assistant_header

    @cached_property
    def template_sha256(self) -> str:
        """SHA-256 over the chat template, and the assistant header if it was set; 64 hex digits."""
        text = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        if self.assistant_header is not None:
            text += json.dumps(self.assistant_header)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the vocabulary; see `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The vocabulary's added tokens, such as those that end a turn; the longest first."""
        added = self.tokenizer.get_added_vocab()
        return tuple(sorted(added, key=len, reverse=True))

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", json.dumps(self.tokenizer.chat_template)))

    @cached_property
    def is_merged(self) -> bool:
        """Whether the template merges a system message with what the user says first."""
        template = self.tokenizer.chat_template
        each = template.values() if isinstance(template, dict) else [template]
        return all(one.startswith(_MERGED) for one in each)

    def reads(self, key: str) -> bool:
        """Whether the template names a key of a message."""
        return key in self._words

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads a message's text as a list of parts."""
        for content in (MARKER, [{"type": "text", "text": MARKER}]):
            messages = [{"role": "user", "content": content}]
            try:
                text = self._apply([messages], None, generation_prompt=True)[0]
            except Exception as error:  # a template may raise anything
                reason = first_line(error)
            else:
                if MARKER in text and "'type'" not in text:  # the list as Python writes it
                    return content is not MARKER
                reason = f"{text!r:.60} for it"
        raise ModelError(
            f"{self.tokenizer.name_or_path}: expected a chat template that renders what a user "
            f"says, found: {reason} (--chat-template-kwargs sets what a template is told, "
            "--chat-template FILE takes another)"
        )

    def _apply(
        self, conversations: list[Any], tools: list[Any] | None, *, generation_prompt: bool
    ) -> list[str]:
        found: list[str] = self.tokenizer.apply_chat_template(
            conversations,
            tools=tools,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            strftime_now=_at_template_date,
            **self.template_kwargs,
        )
        return found

    def render_all(
        self, conversations: Sequence[Conversation], *, generation_prompt: bool
    ) -> list[str | InputError]:
        """The text of each conversation; of one that the template refuses, why.

        A template that writes a generation prompt always, or never, is made to heed what is asked.
        """
        texts = self._render_all(conversations, generation_prompt=generation_prompt)
        mended = self._generation_prompt.mended
        return [
            mended(text, is_asked=generation_prompt) if isinstance(text, str) else text
            for text in texts
        ]

    @cached_property
    def _generation_prompt(self) -> GenerationPrompt:
        said = [_sampled([QUESTION, ANSWER, QUESTION][:turns]) for turns in (1, 2, 3)]
        asked = self._render_all(said[:1], generation_prompt=True)
        texts = asked + self._render_all(said, generation_prompt=False)
        if any(isinstance(text, InputError) for text in texts):
            return GenerationPrompt()
        asked_for, alone, answered, followed = map(str, texts)
        begin = str(self.tokenizer.bos_token or "")
        return generation_prompt_of(asked_for, alone, answered, followed, self.marks, begin)

    def _render_all(
        self, conversations: Sequence[Conversation], *, generation_prompt: bool
    ) -> list[str | InputError]:
        given = [self._given(conversation.messages) for conversation in conversations]
        plain = [i for i, conversation in enumerate(conversations) if conversation.tools is None]
        found: dict[int, str | InputError] = {}
        if plain:
            try:
                texts = self._apply(
                    [given[i] for i in plain], None, generation_prompt=generation_prompt
                )
                found = dict(zip(plain, texts, strict=True))
            except Exception:  # one of them; below it is seen which
                found = {}
        for i, conversation in enumerate(conversations):
            if i not in found:
                found[i] = self._render_one(given[i], conversation.tools, generation_prompt)
        return [found[i] for i in range(len(conversations))]

    def _render_one(
        self, messages: list[Message], tools: tuple[Any, ...] | None, generation_prompt: bool
    ) -> str | InputError:
        refusal = None
        for form in (messages, _with_arguments_as_text(messages)):
            try:
                given = None if tools is None else [*tools]
                return self._apply([form], given, generation_prompt=generation_prompt)[0]
            except Exception as error:  # a template may raise anything
                refusal = refusal or InputError(
                    "expected a conversation that the chat template takes, found: "
                    f"{first_line(error)}{self._mended(messages, error)}"
                )
        assert refusal is not None
        return refusal

    def _mended(self, messages: Sequence[Message], error: Exception) -> str:
        """What may help where the template refuses a conversation."""
        is_of_roles = re.search("system|role|alternat", str(error), re.IGNORECASE)
        can_help = is_of_roles and not self.is_merged and can_merge(messages)
        return MERGE if can_help else " (--chat-template FILE takes another)"

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, tools: Any = None
    ) -> str:
        """The text of one conversation.

        Raises:
            InputError: the template refuses it.
        """
        conversation = Conversation(messages, tools)
        text = self.render_all([conversation], generation_prompt=generation_prompt)[0]
        if isinstance(text, InputError):
            raise text
        return text

    def _given(self, messages: Sequence[Message]) -> list[Message]:
        if not self._wants_parts:
            return list(messages)
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in messages
        ]

    def prompt_ids(self, row: Row) -> list[int]:
        """Token ids of a row's prompt, up to where an answer is generated.

        Raises:
            InputError: the template refuses it, or drops a message; names file and line.
        """
        try:
            render = functools.partial(self.render, generation_prompt=True, tools=row.tools)
            text = render(row.prompt)
            problem = left_out(row.prompt, text, render, is_merged=self.is_merged)
            if problem is not None:
                raise problem
        except InputError as error:
            raise InputError(f"{row.origin or self.tokenizer.name_or_path}: {error}") from None
        return self.ids_of(text)

    def unread(self, row: Row) -> set[str]:
        """Keys of a row's messages, and its tools, that the template does not name."""
        found = {key for message in row.messages if len(message) > 2 for key in message}
        found = {key for key in found - {"role", "content"} if not self.reads(key)}
        tools = {"tools"} if row.tools is not None and not self.reads("tools") else set()
        return {f"messages[].{key}" for key in found} | tools

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a text, none added."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids]

    @cached_property
    def header_ids(self) -> list[int]:
        """The assistant header: what stands between a user's turn and an answer.

        It is what was set; else what the generation prompt adds; where that adds nothing, what
        follows the user's text; where nothing does, the beginning of text.

        Raises:
            ModelError: there is none of these, so a response cannot be told from its prompt.
        """
        if self.assistant_header is not None:
            header = self.ids_of(self.assistant_header)
        else:
            without, with_header = (self._tail(generation_prompt=adds) for adds in (False, True))
            header = with_header[common_start(without, with_header) :] or with_header
            header = header or self._beginning()
        if not header:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: expected a chat template with an assistant header "
                "after a user's turn, found none; --assistant-header says what it is"
            )
        return header

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that the template writes behind a last answer; None where it is no added one.

        A model learns to stop there, also where its generation config does not name it.
        """
        other = MARKER[::-1]
        try:
            text = self._sample([MARKER, other], generation_prompt=False)
        except ModelError:
            return None
        behind = self.ids_of(text.rpartition(other)[2].lstrip())[:1]
        added = set(self.tokenizer.get_added_vocab().values())
        return behind[0] if other in text and behind and behind[0] in added else None

    @cached_property
    def opening(self) -> str:
        """The assistant header as text, where a token of its own is in it; else empty."""
        try:
            text = str(self.tokenizer.decode(self.header_ids)).strip()
        except ModelError:
            return ""
        return text if any(mark in text for mark in self.marks) else ""

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end an answer: the template's and the tokenizer's, as text."""
        own = self.tokenizer
        found = ends_of_answers(own.name_or_path, self.end_of_turn, own.eos_token_id)
        return tuple(text for end in found if (text := str(self.tokenizer.decode([end])).strip()))

    def _tail(self, *, generation_prompt: bool) -> list[int]:
        """What follows a user's text, as token ids."""
        text = self._sample([MARKER], generation_prompt=generation_prompt)
        return self.ids_of(text.rpartition(MARKER)[2])

    def _beginning(self) -> list[int]:
        first = self.tokenizer.bos_token_id
        return [] if first is None else [int(first)]

    def _sample(self, said: Sequence[str], *, generation_prompt: bool) -> str:
        try:
            return self.render(_sampled(said).messages, generation_prompt=generation_prompt)
        except InputError as error:
            raise ModelError(f"{self.tokenizer.name_or_path}: {error}") from None


def chat_of(model: str, settings: ChatSettings) -> Chat:
    """A model's tokenizer, and a chat template: its own, or that of a file.

    Raises:
        MissingFileError: no such path, hub model or file.
        InputError: the file is JSON without a chat template.
        ModelError: there is no tokenizer, or no chat template.
    """
    tokenizer = load_tokenizer(model)
    if settings.chat_template is not None:
        tokenizer.chat_template = _template_of(Path(settings.chat_template))
    return chat_with(tokenizer, settings)


def _template_of(path: Path) -> str:
    """The chat template of a file: all of it, or what JSON has at its key `chat_template`."""
    if path.suffix != ".json":
        return read_text(path)
    value = read_json(path)
    template = value.get("chat_template") if isinstance(value, dict) else None
    if not isinstance(template, str):
        raise InputError(
            f"{path}: expected a chat template as text at the key chat_template, found "
            f"{'none' if template is None else shown(template)}"
        )
    return template


def chat_with(tokenizer: Any, settings: ChatSettings) -> Chat:
    """A tokenizer as the settings say, its chat template changed in place where they say so.

    Raises:
        ModelError: there is no chat template.
    """
    if settings.system_role == "merge":
        tokenizer.chat_template = _merging(getattr(tokenizer, "chat_template", None))
    return Chat(tokenizer, settings.chat_template_kwargs, settings.assistant_header)


# In the template itself, so that whoever loads the model later renders as it was trained.
_MERGED = r"""
{%- if messages | length > 1 and messages[0].role == 'system' and messages[1].role == 'user' -%}
{%- set gap = '\n\n' if messages[1].content is string else [dict(type='text', text='\n\n')] -%}
{%- set said = messages[0].content + gap + messages[1].content -%}
{%- set messages = [dict(messages[1], content=said)] + messages[2:] -%}
{%- endif -%}
"""[1:-1]


def _merging(template: Any) -> Any:
    """A chat template that merges the system message; of several, by name, each."""
    if isinstance(template, dict):
        return {name: _merging(one) for name, one in template.items()}
    return _MERGED + template.removeprefix(_MERGED) if isinstance(template, str) else template


def _sampled(said: Sequence[str]) -> Conversation:
    """A conversation of texts, the user's first."""
    roles = ("user", "assistant")
    return Conversation([{"role": roles[i % 2], "content": text} for i, text in enumerate(said)])


def _with_arguments_as_text(messages: list[Message]) -> list[Message]:
    """Calls of tools with their arguments as JSON text, which a few templates want."""
    return [
        {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _at_template_date(form: str) -> str:
    """The day in place of today's, for templates that write the date: a context is no day's."""
    return datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC).strftime(form)

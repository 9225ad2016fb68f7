"""A row: one conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message


@dataclass(frozen=True)
class Row:
    """One conversation, as the chat template gets it.

    Attributes:
        messages: each with `role`, `content` (text) and whatever else the template may read.
        origin: file and line, for messages to people.
        tools: functions that the conversation may call; None: there are none.
        not_trained: positions of assistant messages that the row says not to learn.
        unread: keys of the row, or `messages[].KEY`, that no form reads.
        category: of a prompt, as its set has it; nothing is trained by it.
    """

    messages: tuple[Message, ...]
    origin: str = ""
    tools: tuple[Any, ...] | None = None
    not_trained: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()
    category: str | None = None

    @property
    def answers(self) -> tuple[int, ...]:
        """Positions of the assistant's messages."""
        return tuple(i for i, m in enumerate(self.messages) if m["role"] == "assistant")

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before a last one that is the assistant's; else all of them."""
        return self.messages[:-1] if self._ends_on_answer else self.messages

    @property
    def response(self) -> str | None:
        """The text of the last message, where it is the assistant's and not empty."""
        return (self.messages[-1]["content"] or None) if self._ends_on_answer else None

    @property
    def question(self) -> str:
        """The text of the prompt's last message."""
        return str(self.prompt[-1]["content"])

    @property
    def _ends_on_answer(self) -> bool:
        return bool(self.messages[-1]["role"] == "assistant")


def has_answer(message: Message) -> bool:
    """Whether a message says anything: text, a call of a tool, or a thought."""
    own = (message.get(key) for key in ("content", "tool_calls", *THOUGHTS))
    return any(value.strip() if isinstance(value, str) else value for value in own)


def texts(messages: Sequence[Message], role: str) -> list[str]:
    """What the messages of one role say."""
    return [message["content"] for message in messages if message["role"] == role]

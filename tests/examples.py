"""Rows as the policy sees them, made in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Message
from pact_offline.rows.tokenize import tokenize_all
from pact_offline.settings.stages import RowSettings


def examples_of(model: Path, rows: Path, **settings: Any) -> list[TokenizedExample]:
    chosen = RowSettings(**settings)
    return tokenize_all(read_rows(rows), chat_of(str(model), chosen), chosen)


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, up to where an answer is generated."""
    chat = Chat(tokenizer)
    return chat.ids_of(chat.render(messages, generation_prompt=True))

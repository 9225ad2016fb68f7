"""Rows as the collator reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pact_offline.cache.targets import TargetCache
from pact_offline.rows.chat import chat_with
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.tokenized import TokenizedRows, tokenized_by


def training_rows(
    sources: Sequence[str | Path], tokenizer: Any, targets: TargetCache
) -> datasets.Dataset:
    """The rows that some targets were made for, tokenized as they were then.

    Raises:
        TargetsMismatchError: other rows, another order, tokenizer or chat template.
    """
    settings = targets.binding.row_settings
    chat = chat_with(tokenizer, settings)
    targets.check_chat(chat.template_sha256, chat.template_kwargs)
    rows = tokenized_by(chat, sources, settings)
    targets.check_rows(rows, settings)
    return memory_mapped(rows)


def memory_mapped(rows: TokenizedRows, first: int = 0) -> datasets.Dataset:
    """Tokenized rows as the collator reads them, with each row's length, and index from `first`."""
    parts = [datasets.Dataset.from_file(str(file)) for file in rows.files]
    found = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    found = found.select_columns(["input_ids", "turns"])
    found = found.add_column("length", rows.lengths)
    found = found.add_column("index", np.arange(first, first + len(rows)))
    return found.with_format("numpy")


def as_dataset(examples: Iterable[TokenizedExample]) -> datasets.Dataset:
    """Examples in memory as the collator reads them."""
    examples = [*examples]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [example.ids for example in examples],
            "turns": [[place for turn in example.turns for place in turn] for example in examples],
            "length": [len(example.ids) for example in examples],
            "index": list(range(len(examples))),
        }
    )

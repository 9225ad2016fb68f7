"""Rows as the collator reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from pact_offline.cache.targets import TargetCache
from pact_offline.rows.chat import tokenize
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.read import read_all_rows


def training_rows(
    sources: Sequence[str | Path], tokenizer: Any, targets: TargetCache
) -> datasets.Dataset:
    """The rows that some targets were made for, tokenized as they were then.

    Raises:
        TargetsMismatchError: other rows, another order or another tokenizer.
    """
    rows = read_all_rows(sources)
    examples = tokenize(rows, tokenizer, targets.binding.max_tokens)
    targets.check_examples(examples, [row.origin for row in rows])
    return as_dataset(examples)


def as_dataset(examples: Sequence[TokenizedExample]) -> datasets.Dataset:
    """Examples as the collator reads them, with each row's length and index."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [example.ids for example in examples],
            "response_start": [example.response_start for example in examples],
            "length": [len(example.ids) for example in examples],
            "index": list(range(len(examples))),
        }
    )

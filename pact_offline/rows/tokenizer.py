"""A model's tokenizer: loaded, and held to its own files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pact_offline.errors import ModelError
from pact_offline.models.locate import (
    hub_name,
    looks_like_path,
    require_model,
    split_adapter,
    why_not_loaded,
)

# transformers 5 takes a tokenizer.json apart for the class that a config names, right or wrong.
_READ = "Hello, my friend.\nI am here"


def load_tokenizer(model: str) -> Any:
    """A model's tokenizer.

    Raises:
        MissingFileError: no such path or hub model.
        ModelError: there is no tokenizer, or one that loses text which its own file keeps.
    """
    from transformers import AutoTokenizer

    require_model(model)
    model, _ = split_adapter(model)
    name, revision = (model, None) if looks_like_path(model) else hub_name(model)
    source = {"pretrained_model_name_or_path": name, "revision": revision or "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        words = _words_given_back(tokenizer)  # odd values of its files show on first use
    except Exception as error:
        reason = why_not_loaded(error, Path(model) if looks_like_path(model) else None)
        raise ModelError(f"{model}: no tokenizer could be loaded: {reason}") from None
    if words != _READ.lower().split() and _gives_back_as_it_is(source):
        raise ModelError(
            f"{model}: expected a tokenizer that gives back {_READ!r}, as its tokenizer.json does, "
            f"found {' '.join(words)!r:.60} by {type(tokenizer).__name__}, as tokenizer_class in "
            "tokenizer_config.json says; with PreTrainedTokenizerFast there tokenizer.json is "
            "taken as it is"
        )
    return tokenizer


def _words_given_back(tokenizer: Any) -> list[str]:
    """What a tokenizer makes of a sentence, and of its ids again."""
    ids = tokenizer(_READ).input_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True)).lower().split()


def _gives_back_as_it_is(source: Mapping[str, str]) -> bool:
    """Whether a tokenizer.json, taken as it is, loses nothing of a sentence."""
    from transformers import PreTrainedTokenizerFast

    try:
        as_it_is = PreTrainedTokenizerFast.from_pretrained(**source, trust_remote_code=False)
        return _words_given_back(as_it_is) == _READ.lower().split()
    except Exception:  # there is none
        return False


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (every token's text and id), 64 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps(vocabulary, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

"""Safety tokens from a list made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pact_offline.errors import InputError
from pact_offline.files import is_text, read_json
from pact_offline.provenance import provenance
from pact_offline.rows.tokenizer import load_tokenizer, tokenizer_fingerprint
from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens

_LARGEST_WEIGHT = 1e30


def _only_token(word: Any, tokenizer: Any, place: str) -> int:
    """The id that a word or an id in a hand-made list stands for."""
    if isinstance(word, int) and not isinstance(word, bool):
        if not 0 <= word < len(tokenizer):
            raise InputError(f"{place}: expected an id below {len(tokenizer)}, found {word}")
        return word
    if not isinstance(word, str) or not word or not is_text(word):
        raise InputError(f"{place}: expected a word, an id, or a pair, found {word!r:.40}")
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise InputError(
            f"{place}: expected a word of one token, found {word!r} in {len(ids)} pieces: {pieces}"
        )
    return int(ids[0])


def read_hand_list(path: Path, model: str) -> SafetyTokens:
    """Read a hand-made list: JSON, each entry a word, an id, or [word or id, weight].

    A word is exactly one token, its leading space included: " can" is not "can". An entry
    without a weight weighs 1; one of weight 0 counts in the softmaxes of `pact` alone.

    Args:
        path: the list.
        model: hub id or path of the model whose tokenizer the words are read with.

    Raises:
        InputError: names the entry, what was expected and what was found.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of words or ids, found {entries!r:.40}")
    tokenizer = load_tokenizer(model)
    weights: dict[int, float] = {}
    for index, entry in enumerate(entries):
        place = f"{path}: entry {index + 1}"
        word, weight = entry if isinstance(entry, list) and len(entry) == 2 else (entry, 1)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 <= weight <= _LARGEST_WEIGHT):
            raise InputError(f"{place}: expected a weight of 0 or more, found {weight!r:.40}")
        id_ = _only_token(word, tokenizer, place)
        if id_ in weights:
            raise InputError(f"{place}: expected each token once, found id {id_} again")
        weights[id_] = float(weight)
    return SafetyTokens(
        tuple(SafetyToken(i, tokenizer.decode([i]), weights[i]) for i in sorted(weights)),
        tokenizer_fingerprint(tokenizer),
        {"mode": "list"},
        provenance(aligned=model),
    )

"""What is in rows, and what of them is trained; needs a tokenizer, and no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pact_offline.errors import InputError
from pact_offline.models.ends import ends_of_answers
from pact_offline.models.locate import hub_name, looks_like_path
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.read import Findings, iterate_rows
from pact_offline.rows.tokenized import TokenizedRows, tokenized_by
from pact_offline.settings.stages import RowSettings
from pact_offline.texts import visible

_PERCENTILES = (0, 50, 90, 99, 100)
_CLOSING = 4  # tokens of an answer among which its end of turn is looked for


@dataclass
class Description:
    """Rows in numbers.

    Attributes:
        sources: row files.
        read: rows in them.
        rows: those that are trained.
        bad, long: those that are left out: unusable, or with no response within `max_tokens`.
        problems: what is wrong with the first of them.
        cut: rows that go on beyond `max_tokens`.
        duplicates: rows whose tokens and turns are those of an earlier row.
        turns: answers that are trained.
        tokens, trained_tokens: of all rows.
        lengths: tokens of a row, at percentiles.
        answer_lengths: trained tokens of a row, at percentiles.
        roles: messages of each role.
        keys: rows with each key that is read.
        unread: rows with each key that nothing reads.
        ends_known: last answers, not cut, that end with an id that ends the model's own answers.
        ends_unknown: last answers, not cut, that do not.
        end_tokens: the ids that end the model's own answers, decoded.
        scaffold: what the template puts before an answer's own text: how many answers have it.
        shown: rows decoded: origin, is_cut, and pieces of text with whether each is trained.
    """

    sources: list[str]
    read: int
    rows: int
    bad: int
    long: int
    problems: list[str]
    cut: int
    duplicates: int
    turns: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    answer_lengths: dict[str, int]
    roles: dict[str, int]
    keys: dict[str, int]
    unread: dict[str, int]
    ends_known: int
    ends_unknown: int
    end_tokens: list[str]
    scaffold: dict[str, int]
    shown: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(
    model: str, sources: Sequence[str], settings: RowSettings, chat: Chat, show: int = 0
) -> Description:
    """Read rows as `score` and `finetune` do, and count; what they would refuse is counted too.

    Args:
        model: whose tokenizer it is; hub id or path.
        sources: row files or hub datasets.
        settings: which tokens of which rows.
        chat: the tokenizer and its template.
        show: how many rows to decode, from the first.

    Raises:
        MissingFileError: no such file.
        InputError: a source cannot be read, or no row of it can be used.
    """
    lenient = settings.model_copy(update={"bad_rows": "drop"})
    if settings.long_rows == "refuse":
        lenient = lenient.model_copy(update={"long_rows": "drop"})
    rows = tokenized_by(chat, sources, lenient, told=False)
    if not len(rows):
        problem = next((one for facts in rows.facts for one in facts.problems), "it has none")
        raise InputError(
            f"{', '.join(sources)}: expected rows that can be used, found none: {problem}"
        )
    roles, keys = _read_again(sources, settings)
    ends = end_ids(model, chat)
    closed = [ends_with(example, ends) for example in rows if not example.is_cut]
    scaffolds = Counter(
        chat.tokenizer.decode(example.ids[turn.header : turn.first])
        for example in rows
        for turn in example.turns
        if turn.header < turn.first
    )
    unread: Counter[str] = Counter()
    for facts in rows.facts:
        unread.update(facts.unread)
    return Description(
        sources=[*sources],
        read=sum(facts.read for facts in rows.facts),
        rows=len(rows),
        bad=sum(facts.bad for facts in rows.facts),
        long=sum(facts.long for facts in rows.facts),
        problems=[problem for facts in rows.facts for problem in facts.problems],
        cut=int(rows.is_cut.sum()),
        duplicates=len(rows) - len(rows.full_keys.unique()),
        turns=int(rows.turns.sum()),
        tokens=int(rows.lengths.sum()),
        trained_tokens=int(rows.steps.sum()),
        lengths=_at_percentiles(rows.lengths),
        answer_lengths=_at_percentiles(rows.steps),
        roles=dict(roles),
        keys={key: count for key, count in keys.items() if key not in unread},
        unread=dict(unread),
        ends_known=sum(closed),
        ends_unknown=len(closed) - sum(closed),
        end_tokens=[chat.tokenizer.decode([end]) for end in ends],
        scaffold=dict(scaffolds.most_common(5)),
        shown=[_shown(rows, index, chat) for index in range(min(show, len(rows)))],
    )


def end_ids(model: str, chat: Chat) -> list[int]:
    """Ids that end an answer: those of a model's configs, its tokenizer's, its template's own."""
    from transformers import AutoConfig, GenerationConfig

    found: list[Any] = []
    name, revision = (model, None) if looks_like_path(model) else hub_name(model)
    where = {"revision": revision or "main", "trust_remote_code": False}
    with suppress(Exception):  # a tokenizer alone has neither
        found.append(GenerationConfig.from_pretrained(name, **where).eos_token_id)
    with suppress(Exception):
        config = AutoConfig.from_pretrained(name, **where)
        found.append(config.get_text_config().eos_token_id)
    return ends_of_answers(model, *found, chat.tokenizer.eos_token_id, chat.end_of_turn)


def _read_again(sources: Sequence[str], settings: RowSettings) -> tuple[Counter[str], Counter[str]]:
    """Messages of each role, and rows with each key of a message and each of their own."""
    roles: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for source in sources:
        for _, row in iterate_rows(Findings(source), columns=settings.columns):
            roles.update(message["role"] for message in row.messages)
            inner = dict.fromkeys(key for message in row.messages for key in message)
            keys.update(f"messages[].{key}" for key in inner)
            keys.update(["tools"] if row.tools else [])
    return roles, keys


def ends_with(example: TokenizedExample, ends: Sequence[int]) -> bool:
    """Whether the last answer ends with an end of turn; a newline may follow it."""
    turn = example.turns[-1]
    closing = example.ids[max(turn.start, turn.end - _CLOSING) : turn.end].tolist()
    return any(end in closing for end in ends)


def _at_percentiles(values: np.ndarray) -> dict[str, int]:
    names = {0: "least", 50: "median", 100: "most"}
    found = np.percentile(values, _PERCENTILES, method="nearest")
    return {
        names.get(percent, f"{percent} %"): int(value)
        for percent, value in zip(_PERCENTILES, found, strict=True)
    }


def _shown(rows: TokenizedRows, index: int, chat: Chat) -> dict[str, Any]:
    """A row decoded: its pieces, and whether each is trained."""
    example, pieces, at = rows[index], [], 0
    for turn in example.turns:
        pieces.append([chat.tokenizer.decode(example.ids[at : turn.start]), False])
        pieces.append([chat.tokenizer.decode(example.ids[turn.start : turn.end]), True])
        at = turn.end
    return {"origin": rows.origin(index), "is_cut": example.is_cut, "pieces": pieces}


def table(found: Description) -> str:
    """The description for a person."""
    lines = [
        f"{found.rows:,} of {found.read:,} rows, {found.turns:,} answers to train, "
        f"{found.tokens:,} tokens, {found.trained_tokens:,} of them trained",
        "",
        f"{'':16}" + "".join(f"{name:>9}" for name in found.lengths),
        f"{'tokens a row':16}" + "".join(f"{n:9,}" for n in found.lengths.values()),
        f"{'trained':16}" + "".join(f"{n:9,}" for n in found.answer_lengths.values()),
        "",
    ]
    counts = {
        "cannot be used": found.bad,
        "no response left within --max-tokens": found.long,
        "cut at --max-tokens": found.cut,
        "the same as an earlier row": found.duplicates,
    }
    lines += [f"{count:9,} rows: {what}" for what, count in counts.items() if count]
    lines += [f"{found.ends_known:9,} rows end their last answer as the model ends a turn"]
    if found.ends_unknown:
        known = ", ".join(map(visible, found.end_tokens)) or "nothing"
        lines.append(
            f"{found.ends_unknown:9,} rows end with none of the model's ends of turn ({known}): "
            "a model trained on them may not stop"
        )
    for text, count in found.scaffold.items():
        lines.append(f"{count:9,} answers follow {visible(text)}, which the template puts there")
    lines.append("")
    lines.append(f"roles: {_listed(found.roles)}")
    lines.append(f"read: {_listed(found.keys)}")
    if found.unread:
        lines.append(f"read by nothing: {_listed(found.unread)}")
    lines += [f"left out: {problem}" for problem in found.problems]
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{visible(name)} ({count:,})" for name, count in counts.items()) or "none"

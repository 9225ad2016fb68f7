"""Sets of prompts: ours, published ones by name, and a user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pact_offline.errors import InputError, SettingError
from pact_offline.evaluation.published_sets import PUBLISHED_SETS, Kind
from pact_offline.evaluation.read_published import read_published
from pact_offline.rows.read import read_rows
from pact_offline.rows.row import Row

# The sets that have an option of their own, and what a right answer to them does.
OUR_SETS: dict[str, Kind] = {
    "harmful": "refuse",
    "borderline": "answer",
    "benign": "answer",
    "task": "task",
}
KINDS: tuple[Kind, ...] = ("refuse", "answer", "task")
HUB = "hub"  # as the source of a published set: where its authors put it
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are asked, and what a right answer to them does.

    Attributes:
        name: `harmful`, that of a published set, or the user's own.
        kind: `refuse`: a refusal is right; `answer`: a refusal is wrong; `task`: the rows' own
            responses are right.
        rows: the prompts; of a task with their responses.
        title: of a column.
    """

    name: str
    kind: Kind
    rows: list[Row]
    title: str


def parse_set(text: str) -> tuple[str, str]:
    """`NAME[:KIND][=SOURCE]` as name with kind, and source; where none is given, the hub.

    Raises:
        SettingError: as of `check_set`.
    """
    name, _, source = text.partition("=")
    check_set(name, source or HUB, f"--set {text}")
    return name, source or HUB


def check_set(name: str, source: str, key: str) -> None:
    """Refuse what names no set; nothing is read.

    Raises:
        SettingError: no name or kind, or of one's own set, no source; begins with `key`.
    """
    bare, _ = kind_of_set(name, key)
    if source == HUB and bare not in PUBLISHED_SETS:
        raise SettingError(
            f"{key}: expected NAME:KIND=SOURCE or one of {', '.join(PUBLISHED_SETS)}, found no "
            "source"
        )


def kind_of_set(name: str, key: str) -> tuple[str, Kind]:
    """Name and kind of `NAME[:KIND]`.

    Raises:
        SettingError: it is no name, or of one's own set, no kind; begins with `key`.
    """
    bare, colon, given = name.partition(":")
    if not _NAME.fullmatch(bare):
        raise SettingError(
            f"{key}: expected a name of lower-case letters, digits and hyphens, found {bare!r:.60}"
        )
    if bare in OUR_SETS:
        raise SettingError(f"{key}: expected another name, found {bare}, which has its own option")
    known = PUBLISHED_SETS[bare].kind if bare in PUBLISHED_SETS else None
    kind = next((kind for kind in KINDS if kind == given), known)
    if kind is None or (colon and given not in KINDS):
        raise SettingError(
            f"{key}: expected {bare}:KIND with one of {', '.join(KINDS)}, found {name!r:.60}"
        )
    if known not in (None, kind):
        raise SettingError(f"{key}: expected {bare}:{known}, as it was published, found {given}")
    return bare, kind


def read_prompts(
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]] = (),
    columns: Mapping[str, str] | None = None,
) -> dict[str, PromptSet]:
    """Every prompt set that is given; only the rows of a task need responses.

    Args:
        sources: of ours, by name; None: not asked.
        further: published sets and the user's own, from `parse_set`.
        columns: names of the rows' columns, but for published sets.

    Raises:
        SettingError: none is given, or two of one name.
        MissingFileError, InputError: names file and line.
    """
    found: dict[str, PromptSet] = {}
    for name, kind in OUR_SETS.items():
        if (source := sources.get(name)) is not None:
            found[name] = PromptSet(name, kind, _read(source, kind, columns), name.capitalize())
    for text, source in further:
        name, kind = kind_of_set(text, f"--set {text}")
        if name in found:
            raise SettingError(f"--set {text}: expected each set once, found {name} again")
        if name in PUBLISHED_SETS:
            rows = read_published(name, None if source == HUB else source)
            found[name] = PromptSet(name, kind, rows, PUBLISHED_SETS[name].title)
        else:
            found[name] = PromptSet(name, kind, _read(source, kind, columns), name)
    if not found:
        options = ", ".join(f"--{name}" for name in (*OUR_SETS, "set"))
        raise SettingError(f"expected at least one set of prompts ({options}), found none")
    return found


def _read(source: str | Path, kind: Kind, columns: Mapping[str, str] | None) -> list[Row]:
    rows = read_rows(source, needs_response=kind == "task", columns=columns, reads_category=True)
    for row in rows:
        if kind == "task" and not row.response:
            raise InputError(
                f"{row.origin}: expected the right answer as the last message, in words, found none"
            )
    return rows

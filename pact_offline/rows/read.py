"""Rows of a source: read, and those that cannot be used counted and named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pact_offline.errors import InputError
from pact_offline.rows.files import Value, origin_of, values_of
from pact_offline.rows.forms import parse_row
from pact_offline.rows.row import Row

log = logging.getLogger(__name__)

BadRows = Literal["refuse", "drop"]
NAMED = 20


@dataclass
class Findings:
    """What was found in a source, beside its rows.

    Attributes:
        source: as it was given.
        bad_rows: what becomes of a source with rows that cannot be used.
        read: values in it.
        bad: rows that cannot be used.
        problems: what is wrong with the first of them.
        unread: rows that have a key which nothing reads, by key.
        reads_category: whether a prompt's category is read.
    """

    source: str
    bad_rows: BadRows = "refuse"
    reads_category: bool = False
    read: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def add_problems(self, problems: Sequence[str]) -> None:
        """Count rows that cannot be used, and keep what is wrong with the first."""
        self.bad += len(problems)
        self.problems += problems[: max(0, NAMED - len(self.problems))]

    def tell(self) -> None:
        """Say what was found; to be called when the source has been read.

        Raises:
            InputError: rows that cannot be used, unless they are to be dropped; or no row is left.
        """
        tell_unread(self.source, self.unread)
        if not self.bad:
            return
        if self.bad == 1 and self.bad_rows == "refuse":
            raise InputError(self.problems[0])
        for problem in self.problems:
            log.warning("%s", problem)
        more = f"{self.bad:,} of {self.read:,} rows cannot be used"
        if self.bad > len(self.problems):
            more += f", the first {len(self.problems)} are named above"
        if self.bad_rows == "refuse":
            raise InputError(f"{self.problems[0]}; {more}; --bad-rows drop goes on without them")
        if self.bad == self.read:
            raise InputError(f"{self.source}: expected rows that can be used, found none: {more}")
        log.warning("%s: %s, and are left out", self.source, more)


def tell_unread(source: str, unread: Mapping[str, int]) -> None:
    """Name the keys that nothing reads, with their counts."""
    if unread:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in unread.items())
        log.warning("%s: keys that nothing reads: %s", source, keys)


def iterate_rows(
    findings: Findings,
    *,
    needs_response: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, Row]]:
    """Each row that can be used, with its line; the others go to the findings.

    Raises:
        MissingFileError, InputError: the source as a whole cannot be read.
    """
    for value in values_of(findings.source):
        findings.read += 1
        try:
            row = row_of(value, findings.source, needs_response=needs_response, columns=columns)
        except InputError as error:
            findings.add_problems([str(error)])
            continue
        read = {"category"} if findings.reads_category and row.category else set()
        findings.unread.update({*row.unread} - read)
        yield value.place, row


def row_of(
    value: Value,
    source: str,
    *,
    needs_response: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Row:
    """The row that a value of a source stands for.

    Raises:
        InputError: it cannot be used; names file and line.
    """
    if value.problem is not None:
        raise value.problem
    origin = origin_of(source, value.place)
    return parse_row(value.value, origin, needs_response=needs_response, columns=columns)


def read_rows(
    source: str | Path,
    *,
    needs_response: bool = True,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "refuse",
    reads_category: bool = False,
) -> list[Row]:
    """All rows of one source, in order.

    Args:
        source: a path, or hub:NAME[:CONFIG[:SPLIT]][@REVISION].
        needs_response, columns: as of `parse_row`.
        bad_rows: what becomes of a source with rows that cannot be used.
        reads_category: the caller reads the rows' categories.

    Raises:
        MissingFileError, InputError: names file and line.
    """
    findings = Findings(str(source), bad_rows, reads_category)
    rows = iterate_rows(findings, needs_response=needs_response, columns=columns)
    found = [row for _, row in rows]
    findings.tell()
    return found


def read_all_rows(sources: Iterable[str | Path], *, needs_response: bool = True) -> list[Row]:
    """Rows of several sources, one after the other."""
    return [row for source in sources for row in read_rows(source, needs_response=needs_response)]

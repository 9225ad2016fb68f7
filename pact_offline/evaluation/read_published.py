"""The prompts of published sets, read in the forms in which they are shipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pact_offline.errors import InputError
from pact_offline.evaluation.published_sets import PUBLISHED_SETS, PublishedSet
from pact_offline.rows.files import origin_of, values_of
from pact_offline.rows.row import Row
from pact_offline.rows.values import key_names

log = logging.getLogger(__name__)


def read_published(name: str, source: str | None) -> list[Row]:
    """The prompts of a published set.

    Args:
        name: a key of `PUBLISHED_SETS`.
        source: the file that its repository ships, or another place on the hub; None: the hub.

    Raises:
        MissingFileError, InputError: there is none, or it has another form; names file and line.
    """
    published = PUBLISHED_SETS[name]
    place = source or published.hub
    rows = [
        Row(({"role": "user", "content": prompt},), origin)
        for prompt, origin in _prompts(published, place)
    ]
    if not rows:
        raise InputError(f"{place}: expected prompts of {published.title}, found none")
    if len(rows) != published.count:
        log.warning(
            "%s: %s was published with %d prompts; these are %d",
            place,
            published.title,
            published.count,
            len(rows),
        )
    return rows


def _prompts(published: PublishedSet, source: str) -> Iterator[tuple[str, str]]:
    """Each prompt of a set, with its file and line."""
    is_first = True
    for value in values_of(source):
        if value.problem is not None:
            raise value.problem
        origin = origin_of(source, value.place)
        found = value.value
        if not isinstance(found, dict):
            raise InputError(
                f"{origin}: expected an object with {_or(published.columns)}, found "
                f"{type(found).__name__}"
            )
        column = next((name for name in published.columns if name in found), None)
        if column is None and published.is_bare and len(found) == 1:
            ((header, prompt),) = found.items()
            if is_first:  # the first line was taken for the names of columns
                yield header, origin_of(source, 1)
                is_first = False
            yield _text(prompt, origin, header), origin
            continue
        if column is None:
            raise InputError(
                f"{origin}: expected the form of {published.title}, with a column "
                f"{_or(published.columns)}, found {key_names(found)}"
            )
        if (
            column == published.columns[0]
            and published.takes
            and not {*published.takes, *published.leaves} & {*found}
        ):
            raise InputError(
                f"{origin}: expected the form of {published.title}, with a column "
                f"{_or((*published.takes,))}, found {key_names(found)}"
            )
        if _is_of(published, found):
            yield _text(found[column], origin, column), origin


def _is_of(published: PublishedSet, row: Mapping[str, Any]) -> bool:
    """Whether a row of a file with several sets is of this one.

    XSTest marks what is unsafe by a label, or in its older form by a type that begins so.
    """

    def matches(wanted: Mapping[str, str]) -> list[bool]:
        known = {key: str(row[key]) for key in wanted if row.get(key) is not None}
        if "label" in known:
            known.pop("type", None)
        return [
            value.startswith(wanted[key]) if key == "type" else value == wanted[key]
            for key, value in known.items()
        ]

    labelled = row.get("label") is not None
    return all(matches(published.takes)) and (labelled or not any(matches(published.leaves)))


def _text(value: Any, origin: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{origin}: {column}: expected text, found {value!r:.40}")
    return value


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)

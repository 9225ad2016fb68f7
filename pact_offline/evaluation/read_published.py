"""The prompts of published sets, read in the forms in which they are shipped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, first_line
from pact_offline.evaluation.published_sets import PUBLISHED_SETS, PublishedSet
from pact_offline.models.locate import hub_name
from pact_offline.rows.files import is_hub, origin_of, values_of
from pact_offline.rows.row import Row
from pact_offline.rows.values import category_of, key_names, text_of

log = logging.getLogger(__name__)


def read_published(name: str, source: str | None) -> list[Row]:
    """The prompts of a published set, with their categories.

    Args:
        name: a key of `PUBLISHED_SETS`.
        source: the file that its repository ships, of several files their folder or one of them,
            or another place on the hub; None: the hub.

    Raises:
        MissingFileError, InputError: there is none, or it has another form; names file and line.
    """
    published = PUBLISHED_SETS[name]
    place = source or published.hub
    rows = [row for file in _files(published, place) for row in _rows(published, file)]
    if not rows:
        wanted = " and ".join(f"{key} {value}" for key, value in published.takes.items())
        raise InputError(
            f"{place}: expected prompts of {published.title}, found none"
            + (f" with {wanted}" if wanted else "")
        )
    if len(rows) != published.count:
        log.warning(
            "%s: %s was published with %d prompts; these are %d",
            place,
            published.title,
            published.count,
            len(rows),
        )
    return rows


def _files(published: PublishedSet, place: str) -> list[str]:
    """The sources that a set is in: of one that is shipped as several files, each."""
    own, (name, _) = published.hub.removeprefix("hub:"), hub_name(place.removeprefix("hub:"))
    if not published.files or (is_hub(place) and name != own) or Path(place).is_file():
        return [place]
    folder = _fetched(published, place) if is_hub(place) else Path(place)
    if not folder.is_dir():
        return [place]
    missing = [name for name in published.files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{place}: expected the {len(published.files)} files of {published.title}, found no "
            f"{', '.join(missing)}"
        )
    return [str(folder / name) for name in published.files]


def _fetched(published: PublishedSet, place: str) -> Path:
    """The folder with a set's files, fetched from the hub where they are not there yet."""
    from huggingface_hub import snapshot_download

    repository, revision = hub_name(place.removeprefix("hub:"))
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*published.files],
        )
    except Exception as error:  # whatever the hub, or the way to it, raises
        raise InputError(
            f"{place}: {published.title} cannot be fetched: {first_line(error)}"
        ) from None
    return Path(folder)


def _rows(published: PublishedSet, source: str) -> Iterator[Row]:
    """The prompts of one file."""
    of_file = published.files.get(Path(source).name)
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
        if column is None and published.files and len(found) == 1:
            ((header, prompt),) = found.items()
            if is_first:  # the first line was taken for the names of columns
                first = origin_of(source, 1)
                yield _row(_text(header, first, "prompt"), first, of_file)
                is_first = False
            yield _row(_text(prompt, origin, "prompt"), origin, of_file)
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
            category = of_file or category_of(found, published.category) or category_of(found)
            yield _row(_text(found[column], origin, column), origin, category)


def _row(prompt: str, origin: str, category: str | None) -> Row:
    return Row(({"role": "user", "content": prompt},), origin, category=category)


def _is_of(published: PublishedSet, row: Mapping[str, Any]) -> bool:
    """Whether a row of a file with several sets is of this one.

    XSTest marks what is unsafe by a label, or in its older form by a type that begins so.
    """

    def matches(wanted: Mapping[str, str]) -> list[bool]:
        known = {key: str(row[key]).strip().lower() for key in wanted if row.get(key) is not None}
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
    return text_of(value, column, origin)


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)

"""A dataset audited by the aligned model: the answers that it would have refused to give.

Read from the cache and the rows' own text; no model and no tokenizer is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.cache.refused import Turns, turns_of
from pact_offline.cache.targets import TargetCache
from pact_offline.errors import InputError, SettingError, StoreError, TargetsMismatchError
from pact_offline.rows.files import checksum_of, is_hub, origin_of, values_of
from pact_offline.rows.read import row_of
from pact_offline.rows.row import THOUGHTS, Message, Row
from pact_offline.rows.spans import trained_turns
from pact_offline.rows.subset import Subset, write_subsets
from pact_offline.texts import fitted, printable

log = logging.getLogger(__name__)

BINS = 10
_OPENING = 120


@dataclass(frozen=True)
class ScreenedTurn:
    """An answer of the dataset.

    Attributes:
        row: its row, from 0.
        turn: its number among the trained answers of the row, from 0.
        origin: file and line.
        share: probability of all weighted safety tokens at its first step.
        loss: the reference's mean cross-entropy of it, in nats a token.
        steps: response steps.
        prompt, answer: how they begin; None where the rows are not there as they were scored.
    """

    row: int
    turn: int
    origin: str
    share: float
    loss: float
    steps: int
    prompt: str | None
    answer: str | None


class Screening:
    """What the aligned model thinks of every answer of a dataset."""

    def __init__(
        self, targets: TargetCache, weights: np.ndarray, sources: Sequence[str] = ()
    ) -> None:
        """Read it.

        Args:
            targets: of the dataset.
            weights: float [ids], safety-token weights.
            sources: where its rows are now, in their order; none: where they were when they were
                scored. A dataset of the hub is read only if it is named here.

        Raises:
            SettingError: another number of sources.
            StoreError: the targets do not say what was scored.
        """
        self._targets = targets
        facts, rows = targets.binding.rows, targets.binding.keys
        for number, one in enumerate(facts):
            if not isinstance(one, dict) or not isinstance(one.get("source"), str):
                raise StoreError(
                    f"{targets.path}: rows.{number}: expected an object with a source, found "
                    f"{one!r:.40}"
                )
        if sources and len(sources) != len(facts):
            scored = ", ".join(str(one["source"]) for one in facts)
            raise SettingError(
                f"--rows: expected the {len(facts)} sources that were scored ({scored}), found "
                f"{len(sources)}"
            )
        self._sources = []
        for number, one in enumerate(facts):
            mine = np.flatnonzero(rows.sources == number)
            name = sources[number] if sources else str(one["source"])
            is_followed = bool(sources) or not is_hub(name)
            found = _Source(name, one.get("sha256"), mine, rows.places[mine], is_followed)
            self._sources.append(found)
        self.turns: Turns = turns_of(targets, weights)

    def __len__(self) -> int:
        return len(self.turns.shares)

    @property
    def order(self) -> np.ndarray:
        """Turns by falling share, int64 [turns]."""
        return np.argsort(-self.turns.shares, kind="stable")

    def histogram(self) -> list[int]:
        """Turns by their share, in `BINS` bins of equal width from 0 to 1."""
        counts, _ = np.histogram(self.turns.shares, bins=BINS, range=(0, 1))
        return [int(count) for count in counts]

    def refused_rows(self, above: float) -> np.ndarray:
        """Rows with an answer that the model would have refused, int64 [some]."""
        return np.unique(self.turns.rows[self.turns.refused(above)])

    def top(self, count: int | None = None) -> list[ScreenedTurn]:
        """The answers with the largest share, with how they begin."""
        chosen = self.order[:count]
        rows = self.turns.rows
        texts = self._texts({int(rows[turn]) for turn in chosen})
        return [self._turn(int(turn), int(rows[turn]), texts) for turn in chosen]

    def _turn(self, turn: int, row: int, texts: dict[int, Row]) -> ScreenedTurn:
        number = turn - (int(self.turns.ends[row - 1]) if row else 0)
        prompt = answer = None
        if row in texts:
            settings = self._targets.binding.row_settings
            places = trained_turns(texts[row], settings.turns)
            if number < len(places):
                messages = texts[row].messages
                prompt, answer = _said_before(messages[: places[number]]), messages[places[number]]
        return ScreenedTurn(
            row=row,
            turn=number,
            origin=self._origin(row),
            share=round(float(self.turns.shares[turn]), 6),
            loss=round(float(self.turns.losses[turn]), 6),
            steps=int(self.turns.steps[turn]),
            prompt=prompt,
            answer=None if answer is None else _text_of(answer)[:_OPENING],
        )

    def _origin(self, row: int) -> str:
        keys = self._targets.binding.keys
        return origin_of(self._sources[int(keys.sources[row])].name, int(keys.places[row]))

    def _texts(self, wanted: set[int]) -> dict[int, Row]:
        """Some rows as they stand in their sources; without those of a source that has changed."""
        columns = self._targets.binding.row_settings.columns
        found: dict[int, Row] = {}
        for source in self._sources:
            mine = wanted.intersection(source.rows.tolist())
            if not mine:
                continue
            if (problem := source.problem) is not None:
                log.warning("%s: the beginnings of its rows are not shown", problem)
                continue
            place_of, _ = source.ordinals()
            ordinals = {place_of[row]: row for row in mine if row in place_of}
            for ordinal, value in enumerate(values_of(source.name)):
                if ordinal in ordinals and value.problem is None:
                    row = row_of(value, source.name, columns=columns)
                    found[ordinals[ordinal]] = row
        return found

    def write_others(self, above: float, outputs: Sequence[Path]) -> list[tuple[int, int]]:
        """Write each source without the rows of which the model would have refused an answer.

        Returns:
            of each file: its values, and those of the source.

        Raises:
            SettingError: another number of files than sources.
            TargetsMismatchError, InputError: a source is not as it was scored.
        """
        if len(outputs) != len(self._sources):
            names = ", ".join(source.name for source in self._sources)
            raise SettingError(
                f"-o: expected a file for each source ({names}), found {len(outputs)}"
            )
        taken = {Path(source.name).resolve() for source in self._sources}
        for output in outputs:
            if output.resolve() in taken:
                raise SettingError(f"-o: expected a file of its own, found {output} again")
            taken.add(output.resolve())
        refused = self.refused_rows(above)
        for source in self._sources:
            if (problem := source.problem) is not None:
                raise TargetsMismatchError(f"{problem}; nothing is written")
        kept = [self._kept(source, refused) for source in self._sources]
        parts = zip(self._sources, kept, outputs, strict=True)
        write_subsets([Subset(source.name, some, output) for source, some, output in parts])
        return [(int(some.sum()), len(some)) for some in kept]

    def _kept(self, source: _Source, refused: np.ndarray) -> np.ndarray:
        """Which values of a source are not among some rows, bool [values]."""
        place_of, values = source.ordinals()
        mine = np.intersect1d(refused, source.rows).tolist()
        if (unknown := next((row for row in mine if row not in place_of), None)) is not None:
            raise InputError(
                f"{self._origin(unknown)}: expected to know which value of its line that row is, "
                "but others of the line were left out; put each value on a line of its own"
            )
        kept = np.ones(values, bool)
        kept[[place_of[row] for row in mine]] = False
        return kept

    def to_dict(self, above: float, count: int | None = None) -> dict[str, Any]:
        """For machines, and for the report."""
        return {
            "targets": str(self._targets.path),
            "sources": [source.name for source in self._sources],
            "rows": len(self.turns.ends),
            "turns": len(self),
            "above": above,
            "refused_turns": int(self.turns.refused(above).sum()),
            "refused_rows": len(self.refused_rows(above)),
            "refused_steps_share": self.refused_steps_share(above),
            "histogram": self.histogram(),
            "top": [asdict(turn) for turn in self.top(count)],
        }

    def refused_steps_share(self, above: float) -> float:
        """The share of the dataset's response steps that are of refused answers."""
        refused = self.turns.steps[self.turns.refused(above)].sum()
        return round(float(refused / self.turns.steps.sum()), 6)


@dataclass(frozen=True)
class _Source:
    """A source of a dataset, and its rows with their places; a dataset of the hub is followed only
    where a user names it.
    """

    name: str
    sha256: str | None
    rows: np.ndarray
    places: np.ndarray
    is_followed: bool

    @cached_property
    def problem(self) -> str | None:
        """Why its rows cannot be looked at: it is gone, or is another."""
        if not self.is_followed:
            return f"{self.name}: is read only if it is named, with --rows"
        if is_hub(self.name):
            log.warning("%s: whether it has changed since it was scored is not known", self.name)
        try:
            found = checksum_of(self.name)
        except (OSError, InputError) as error:
            return str(error)
        return None if found == self.sha256 else f"{self.name}: has changed since it was scored"

    def ordinals(self) -> tuple[dict[int, int], int]:
        """The place of each row among the source's values, from 0, and how many values it has.

        Several values of a JSON array may stand in one line; where not all of those became rows, it
        is not known which did, and they are left out.
        """
        by_place: dict[int, list[int]] = {}
        values = 0
        for ordinal, value in enumerate(values_of(self.name)):
            by_place.setdefault(value.place, []).append(ordinal)
            values = ordinal + 1
        rows: dict[int, list[int]] = {}
        for row, place in zip(self.rows.tolist(), self.places.tolist(), strict=True):
            rows.setdefault(place, []).append(row)
        pairs = (
            zip(some, by_place[place], strict=True)
            for place, some in rows.items()
            if len(by_place.get(place, ())) == len(some)
        )
        return {row: ordinal for some in pairs for row, ordinal in some}, values


def _said_before(messages: Sequence[Message]) -> str:
    """How the last thing that was said to the model begins."""
    for message in reversed(messages):
        if message["role"] != "assistant" and message["content"]:
            return str(message["content"])[:_OPENING]
    return ""


def _text_of(message: Message) -> str:
    """What an answer says; a thought or a call of a tool where it has no text."""
    if message.get("content"):
        return str(message["content"])
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if thought:
        return str(thought)
    return json.dumps(message.get("tool_calls"), ensure_ascii=False)


def table(screening: Screening, above: float, count: int, width: int) -> str:
    """The screening for a person.

    Args:
        screening: of a dataset.
        above: which share counts as refused.
        count: answers to show.
        width: columns of the terminal.
    """
    counts = screening.histogram()
    most, longest = max(counts), max(1, min(40, width - 26))
    lines = [f"{'share at step 0':15} {'answers':>9}"]
    for number, found in enumerate(counts):
        bar = "█" * round(longest * found / most) or ("▏" if found else "")
        lines.append(
            f"{number / BINS:6.1f} to {(number + 1) / BINS:4.1f} {found:9,} {bar}".rstrip()
        )
    refused = int(screening.turns.refused(above).sum())
    lines.append("")
    lines.append(
        f"{refused:,} of {len(screening):,} answers, in "
        f"{len(screening.refused_rows(above)):,} of {len(screening.turns.ends):,} rows, would have "
        f"been refused (above {above:g}): {screening.refused_steps_share(above):.1%} of the steps"
    )
    top = screening.top(count)
    if not top:
        return "\n".join(lines)
    origins = min(max(len(printable(turn.origin)) for turn in top), max(12, width // 3))
    each = max(8, (width - origins - 20) // 2)
    lines += ["", f"{'share':>6} {'loss':>6}  {'row':{origins}}  {'prompt':{each}}  answer"]
    for turn in top:
        cells = (
            f"{turn.share:6.3f} {turn.loss:6.2f}",
            fitted(turn.origin, origins, keeps_end=True),
            *(fitted(text, each) for text in (turn.prompt, turn.answer)),
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

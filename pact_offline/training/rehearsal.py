"""Rehearsal: rows of the reference's own answers, mixed into every batch and not learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from pact_offline.cache.targets import TargetCache, answers_place
from pact_offline.errors import MissingFileError, TargetsMismatchError
from pact_offline.models.locate import ModelFiles
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import ContextKind
from pact_offline.rows.positions import require_positions
from pact_offline.rows.tokenized import TokenizedRows, tokenized_rows
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.training.collator import TargetSource
from pact_offline.training.uses import Uses

Place = tuple[int, tuple[int, ...]]  # a row, and the rehearsed rows that go with it


class RehearsalSampler(Sampler[Place]):
    """Another sampler's rows, each with the rehearsed rows that go with it.

    They are dealt out evenly, by the place of a row in the whole training, so that a run that goes
    on from a checkpoint sees the same. Each pass over them has another order.
    """

    def __init__(self, rows: Sampler[int], count: int, share: float, seed: int) -> None:
        """Deal out so many rows.

        Args:
            rows: the sampler of the task's rows.
            count: rehearsed rows that there are.
            share: of a batch's rows that are rehearsed, at least 0 and below 1.
            seed: of their order.
        """
        self._rows, self._count, self._seed = rows, count, seed
        self._each = share / (1 - share)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows) if isinstance(self._rows, Sized) else 0

    def __iter__(self) -> Iterator[Place]:
        first = self._epoch * len(self)
        for place, row in enumerate(self._rows, first):
            dealt = range(int(place * self._each), int((place + 1) * self._each))
            yield int(row), tuple(self._at(number) for number in dealt)

    def _at(self, number: int) -> int:
        if number // self._count != getattr(self, "_pass", None):
            self._pass = number // self._count
            order = np.random.default_rng([self._seed, self._pass])
            self._order = order.permutation(self._count)
        return int(self._order[number % self._count])


class RehearsedRows(Dataset[Any]):
    """Task rows and rehearsed rows as one dataset, by the places of a `RehearsalSampler`."""

    def __init__(self, rows: Any, rehearsed: Any) -> None:
        """Put a dataset behind another.

        Args:
            rows, rehearsed: items as `ResponseCollator` reads them; the `index` of a rehearsed one
                goes on from the task's last.
        """
        self.rows, self.rehearsed = rows, rehearsed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: Sequence[Place]) -> list[list[Any]]:
        """A batch, each row with its rehearsed ones: two look-ups, whatever their number."""
        rows = _items(self.rows, [row for row, _ in places])
        rehearsed = iter(_items(self.rehearsed, [at for _, others in places for at in others]))
        return [
            [item, *islice(rehearsed, len(others))]
            for item, (_, others) in zip(rows, places, strict=True)
        ]

    def __getitem__(self, place: Place) -> list[Any]:
        (found,) = self.__getitems__([place])
        return found


def _items(dataset: Any, places: list[int]) -> list[Any]:
    return list(dataset.__getitems__(places)) if places else []


def weight_beside(rows: TokenizedRows, uses: Uses, rehearsed: TokenizedRows) -> float:
    """How often a rehearsed step counts in the objective, for a rehearsed row to count as one of
    the task's does: as often as the task's rows have more steps, and at least once.

    The objective is a mean over steps: beside answers of hundreds of them, the few of a rehearsed
    answer would be lost in it.

    Args:
        rows: of the task.
        uses: of their answers.
        rehearsed: rows of the reference's own answers.
    """
    times = float(rows.steps[uses.kept_rows].mean() / rehearsed.steps.mean())
    return max(1.0, round(times, 2))


class JoinedTargets:
    """Two sources of targets, one behind the other."""

    def __init__(self, first: TargetSource, rows: int, second: TargetSource) -> None:
        """Join them.

        Args:
            first: of the task's rows.
            rows: how many those are.
            second: of the rehearsed rows.
        """
        self._sources, self._rows = (first, second), rows
        self.safety_ids = first.safety_ids

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        return self._read(indices, lambda source, some: source.read(some, kind))

    def read_labels(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-probabilities of the responses' own tokens, float32 [steps]; as `read`."""
        return self._read(indices, lambda source, some: source.read_labels(some, kind))

    def _read(
        self,
        indices: Sequence[int],
        read: Callable[[TargetSource, list[int]], np.ndarray],
    ) -> np.ndarray:
        """Read each run of examples of one source at once."""
        parts = []
        for is_second, run in groupby(indices, lambda index: int(index >= self._rows)):
            some = [index - is_second * self._rows for index in run]
            parts.append(read(self._sources[is_second], some))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Rehearsal:
    """Rows of the reference's own answers, and their targets.

    Attributes:
        rows: tokenized as they were scored.
        targets: of these rows, in their order.
    """

    rows: TokenizedRows
    targets: TargetCache

    @classmethod
    def open(
        cls,
        path: Path,
        model: ModelFiles,
        chat: Chat,
        tokens: SafetyTokens,
        *,
        cache_place: str | None = None,
    ) -> Rehearsal:
        """Open what `pact-offline rehearse` wrote, and refuse what is of another reference.

        Args:
            path: its targets.json; the rows lie beside it.
            model: the reference.
            chat: of the run.
            tokens: of the run.
            cache_place: the `cache` of `TargetCache.open`.

        Raises:
            MissingFileError: there are no rows beside it.
            TargetsMismatchError: `score` wrote it; or another model, template, safety tokens, or
                rows.
        """
        targets = TargetCache.open(path, verify_all=True, cache=cache_place)
        if not targets.is_rehearsal:
            raise TargetsMismatchError(
                f"{path}: expected what `pact-offline rehearse` wrote, found targets of rows that "
                "`pact-offline score` read"
            )
        answers = answers_place(path)
        if not answers.is_file():
            raise MissingFileError(
                f"{answers}: no such file; the answers that `pact-offline rehearse` wrote lie "
                f"beside {path.name}, and are needed with it"
            )
        targets.check_model(model)
        targets.check_safety_ids(tokens.ids, "--safety-tokens")
        targets.check_chat(chat.template_sha256, chat.template_kwargs)
        settings = targets.binding.row_settings
        rows = tokenized_rows(model, [answers], settings, lambda: chat)
        require_positions(model, rows)
        targets.check_rows(rows, settings)
        return cls(rows, targets)

    @property
    def digest(self) -> str:
        """Of what decides its part of a run, 64 hex digits."""
        parts = self.targets.binding.identity.digest + self.rows.digest()
        return hashlib.sha256(parts.encode()).hexdigest()

"""From examples and targets to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pact_offline.models.batches import batches
from pact_offline.models.log_confidences import IGNORED, aligned_batch, packed_batch
from pact_offline.rows.contexts import ContextKind
from pact_offline.rows.spans import Turn
from pact_offline.training.uses import DROPPED, LEARNT, REHEARSED, Uses

_PASS_COSTS = 64  # what reading all weights once more costs on a CPU, in tokens


class TargetSource(Protocol):
    """Where a batch's targets come from: a `TargetCache`, or a `LiveReference`."""

    @property
    def safety_ids(self) -> list[int]: ...

    def read(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-confidences of some examples one after the other, float32 [steps, safety ids]."""
        ...

    def read_labels(self, indices: Sequence[int], kind: ContextKind) -> np.ndarray:
        """Log-probabilities of the responses' own tokens, float32 [steps]; as `read`."""
        ...


class ResponseCollator:
    """Pads rows so that response steps share columns, and adds the targets of each row.

    Each item is ``{"input_ids": [...], "turns": [...], "index": int}``, where `turns` holds header,
    start, first and end of each trained answer (see `rows.spans.Turn`), and `index` is the row's
    place in the targets. The batch holds, for `rows` rows, `width` tokens and `columns` response
    columns:

    - ``input_ids``, ``attention_mask``, ``position_ids``: int64 [rows, width]
    - ``logits_to_keep``: int64 [columns], the token columns whose logits predict the response
    - ``labels``: int64 [rows, 1 + columns], as usual one column ahead of the logits that predict
      it: -100, then the response tokens; -100 between answers and where a row has ended
    - ``step_numbers``: int64 [rows, columns], each response step's number in its answer
    - with targets: ``target_full`` and, if asked for, ``target_response_only``:
      float32 [steps, ids], one row for each label that is not -100, in row-major order
    - with labels: ``target_label``: float32 [steps], in that order
    - with uses: ``is_learnt``: bool [steps], in that order; the others are held only
    - with a weight of rehearsed steps other than 1: ``step_weights``: float32 [steps], how much
      each counts in the objective
    """

    def __init__(
        self,
        pad_id: int | None,
        targets: TargetSource | None = None,
        *,
        response_only: bool = True,
        labels: bool = False,
        uses: Uses | None = None,
        rehearsal_weight: float = 1,
        packed: bool = False,
    ) -> None:
        """Collate for a model.

        Args:
            pad_id: fills the padding, which is masked out; None, of a tokenizer without: 0.
            targets: by the items' `index`.
            response_only: whether the targets without the prompt are wanted.
            labels: whether the reference's log-probabilities of the responses' own tokens are.
            uses: by the items' `index`; None: every answer is learnt.
            rehearsal_weight: of a step of a rehearsed answer in the objective; of others it is 1.
            packed: put the rows one after the other into one, with no padding; then `rows` is 1,
                `columns` the number of steps, and there is no ``attention_mask``.
        """
        self.pad_id, self.targets, self.response_only = pad_id or 0, targets, response_only
        self.labels, self.uses, self.packed = labels, uses, packed
        self.rehearsal_weight = rehearsal_weight

    def turns_of(self, item: dict[str, Any]) -> list[Turn]:
        """The answers of a row, without those that are left out."""
        numbers = [int(number) for number in item["turns"]]
        turns = [Turn(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
        if self.uses is None:
            return turns
        uses = self.uses.of(item["index"])
        return [turn for turn, use in zip(turns, uses, strict=True) if use != DROPPED]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        turns = [self.turns_of(item) for item in items]
        contexts = [
            (item["input_ids"][: some[-1].end], [(turn.start, turn.end) for turn in some])
            for item, some in zip(items, turns, strict=True)
        ]
        aligned = packed_batch(contexts) if self.packed else aligned_batch(contexts, self.pad_id)
        numbers = torch.zeros_like(aligned.labels)
        numbers[aligned.is_step] = torch.cat(
            [
                torch.arange(turn.start - turn.first, turn.end - turn.first)
                for some in turns
                for turn in some
            ]
        )
        ahead = aligned.labels.new_full((len(aligned.labels), 1), IGNORED)
        batch = {
            **aligned.inputs,
            "logits_to_keep": aligned.columns,
            "labels": torch.cat((ahead, aligned.labels), dim=1),
            "step_numbers": numbers,
        }
        uses = self._uses_of_steps(items)
        if uses is not None:
            kept = torch.from_numpy(uses[uses != DROPPED])
            batch["is_learnt"] = kept == LEARNT
            if self.rehearsal_weight != 1:
                batch["step_weights"] = 1 + (self.rehearsal_weight - 1) * (kept == REHEARSED)
        if self.targets is not None:
            indices = [item["index"] for item in items]
            kinds: list[ContextKind] = ["full", "response_only"]
            for kind in kinds if self.response_only else kinds[:1]:
                batch[f"target_{kind}"] = _kept(self.targets.read(indices, kind), uses)
            if self.labels:
                batch["target_label"] = _kept(self.targets.read_labels(indices, "full"), uses)
        return batch

    def _uses_of_steps(self, items: Sequence[dict[str, Any]]) -> np.ndarray | None:
        """What each step of the items' targets is for, int8 [steps]."""
        if self.uses is None:
            return None
        parts = []
        for item in items:
            places = np.asarray(item["turns"]).reshape(-1, 4)
            parts.append(np.repeat(self.uses.of(item["index"]), places[:, 3] - places[:, 1]))
        return np.asarray(np.concatenate(parts))


def _kept(values: np.ndarray, uses: np.ndarray | None) -> Tensor:
    """Of values a step, those that are not left out."""
    return torch.from_numpy(values if uses is None else values[uses != DROPPED])


class PassCollator:
    """Cuts a batch into passes of rows of like length, each collated by itself.

    The result holds ``passes``, a list of batches, and ``labels``, int64 [1 + steps]: -100, then
    those of all passes, which the Trainer counts; with uses also their ``is_learnt``, bool [steps].
    An item may be a list of them: a row, and what is rehearsed with it.
    """

    def __init__(self, collate: ResponseCollator, pass_tokens: int | None = None) -> None:
        """Cut at `pass_tokens` tokens, with padding, a pass; None: never. A row is never cut."""
        self.collate, self.pass_tokens = collate, pass_tokens

    def __call__(self, items: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        passes = [self.collate(part) for part in self._cut(rows)]
        steps = [batch["labels"][:, 1:].flatten() for batch in passes]
        batch: dict[str, Any] = {"passes": passes}
        batch["labels"] = torch.cat([steps[0].new_tensor([IGNORED]), *steps])
        if "is_learnt" in passes[0]:
            batch["is_learnt"] = torch.cat([one["is_learnt"] for one in passes])
        return batch

    def _cut(self, items: Sequence[dict[str, Any]]) -> Sequence[Sequence[dict[str, Any]]]:
        if self.pass_tokens is None:
            return [items]
        starts = [self.collate.turns_of(item)[0].start for item in items]
        lengths = [len(item["input_ids"]) for item in items]
        sizes = [(start, length - start) for start, length in zip(starts, lengths, strict=True)]
        order = sorted(range(len(items)), key=lambda i: -lengths[i])
        parts = batches(order, sizes, self.pass_tokens, padded=not self.collate.packed)
        if self.collate.packed:
            return [[items[i] for i in part] for part in parts]
        return [[items[i] for i in half] for part in parts for half in _halved(part, sizes)]


def _halved(rows: list[int], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows in their order as one pass, or as two where that spares enough padding: short rows that
    are rehearsed beside long ones would be most of a batch's tokens.

    Args:
        rows: indices into `sizes`.
        sizes: tokens before and within each response.
    """

    def padded(some: list[int]) -> int:
        return len(some) * (max(sizes[i][0] for i in some) + max(sizes[i][1] for i in some))

    def both(at: int) -> int:
        return padded(rows[:at]) + padded(rows[at:])

    at = min(range(1, len(rows)), key=both, default=0)
    if at and both(at) + _PASS_COSTS < padded(rows):
        return [rows[:at], rows[at:]]
    return [rows]

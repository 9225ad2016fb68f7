"""What an evaluation found: `metrics.json`, read by the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pact_offline.errors import InputError
from pact_offline.files import read_json, write_json

FORMAT_VERSION = 1
_Z95 = 1.959963984540054

RateName = Literal[
    "harmful_refused",
    "harmful_unsafe",
    "borderline_refused",
    "benign_refused",
    "task_refused",
    "task_accuracy",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(_Frozen):
    """A share with its 95 % Wilson interval; all in 0..1."""

    count: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Rate:
        """The rate `count / total` (Wilson, 1927, without continuity correction)."""
        value, z2 = count / total, _Z95**2
        centre = (value + z2 / (2 * total)) / (1 + z2 / total)
        half = _Z95 * math.sqrt(value * (1 - value) / total + z2 / (4 * total**2))
        half /= 1 + z2 / total
        low = 0.0 if count == 0 else centre - half
        high = 1.0 if count == total else centre + half
        return cls(count=count, total=total, value=value, low=low, high=high)


class TokenCurve(_Frozen):
    """Mean probability of one safety token at response steps 0, 1, ..."""

    id: int
    text: str
    weight: float
    reference: list[float]
    policy: list[float]


class Drift(_Frozen):
    """Confidences under teacher forcing of the reference's own answers to the harmful prompts.

    Attributes:
        prompts: answers averaged over.
        total_reference, total_policy: mean summed probability of the weighted safety ids by step.
        tokens: the most confident safety tokens, by step.
    """

    prompts: int
    total_reference: list[float]
    total_policy: list[float]
    tokens: list[TokenCurve]


class Sample(_Frozen):
    """One answer, to show."""

    prompts: Literal["harmful", "borderline", "benign", "task"]
    prompt: str
    answer: str
    refused: bool


class Metrics(_Frozen):
    """One evaluated model.

    Attributes:
        name: of the run, or "reference".
        is_reference: whether this is the reference model itself.
        rates: what was counted.
        drift: against the reference; None for the reference itself.
        samples: the same prompts for every model, in the same order.
        run: settings of the fine-tuning run (from the adapter), empty for the reference.
        settings: of this evaluation.
        judge: what a refusal is: name, and phrases or guard model.
    """

    format_version: Literal[1] = 1
    name: str
    is_reference: bool
    model: str
    adapter: str | None
    rates: dict[RateName, Rate]
    drift: Drift | None
    samples: list[Sample]
    run: dict[str, Any]
    settings: dict[str, Any]
    judge: dict[str, Any]
    provenance: dict[str, Any]

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Metrics:
        """Read metrics.json; `MissingFileError` or `InputError` where it is none."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {key}: {first['msg']}") from None

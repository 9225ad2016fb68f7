"""What an evaluation found: `metrics.json`, read by the report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pact_offline.errors import InputError
from pact_offline.evaluation.published_sets import Kind
from pact_offline.files import read_json, write_json
from pact_offline.made_from import MadeFrom

METRICS_FILE = "metrics.json"
FORMAT_VERSION = 3
_Z95 = 1.959963984540054
_RESAMPLES = 2000
_ROUNDING = 1e-3  # that a share of others may be off its count
# By earlier format: what it does not say, as empty.
_UNSAID: dict[int, dict[str, Any]] = {
    1: {
        "made_from": {"models": {}, "rows": {}, "tokenizer": "", "template": ""},
        "answers_sha256": "",
        "reference_sha256": None,
        "own_rates": [],
        "sets": {},
    },
    2: {"sets": {}},
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Numbers(_Frozen, strict=True):
    """What holds numbers, and takes no text for one."""


class Rate(_Numbers):
    """A share with its 95 % Wilson interval; all in 0..1."""

    count: NonNegativeInt
    total: PositiveInt
    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _is_a_share(self) -> Rate:
        is_off = abs(self.value - self.count / self.total) > _ROUNDING
        if self.count > self.total or is_off:
            raise ValueError(
                f"expected a share of the total, found {self.count} of {self.total}, {self.value:g}"
            )
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"expected an interval around {self.value:g}, found {self.low:g} to {self.high:g}"
            )
        return self

    @classmethod
    def of(cls, count: int, total: int) -> Rate:
        """The rate `count / total` (Wilson, 1927, without continuity correction)."""
        low, high = _wilson(count / total, total)
        return cls(count=count, total=total, value=count / total, low=low, high=high)


def _wilson(value: float, total: int) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (value + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(value * (1 - value) / total + z2 / (4 * total**2))
    half /= 1 + z2 / total
    return 0.0 if value == 0 else centre - half, 1.0 if value == 1 else centre + half


class Mean(_Numbers):
    """A mean over prompts of what is no share, with its 95 % interval, in the score's own unit.

    Attributes:
        title, better: the heading of its column; `better` is empty where nobody says which way is.
        total: prompts.
        low, high: None where no interval is known.
    """

    title: str
    better: str
    total: int
    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, scores: Sequence[float], title: str, better: str) -> Mean:
        """The mean of scores in 0..1, with the percentile interval of a bootstrap over them.

        The draws are the same in every call (Efron and Tibshirani, 1993, chapter 13). Where all
        scores are equal resampling shows no spread, and Wilson's interval of a share of this size
        stands: no scores in 0..1 of that mean vary more than those of a share.
        """
        values, draw = np.asarray(scores, dtype=float), np.random.default_rng(len(scores))
        total, value = len(values), float(values.mean())
        if (values == values[0]).all():
            low, high = _wilson(value, total)
        else:
            means = [values[draw.integers(total, size=total)].mean() for _ in range(_RESAMPLES)]
            low, high = map(float, np.quantile(means, [0.025, 0.975]))
        return cls(title=title, better=better, total=total, value=value, low=low, high=high)

    @classmethod
    def with_error(
        cls, value: float, error: float | None, total: int, title: str, better: str
    ) -> Mean:
        """A mean whose standard error is known: the interval is the normal one, at 1.96 of it.

        An error of 0 or None is none that an interval could be made of.
        """
        half = _Z95 * error if error else None
        low, high = (None, None) if half is None else (value - half, value + half)
        return cls(title=title, better=better, total=total, value=value, low=low, high=high)


class TokenCurve(_Numbers):
    """Mean probability of one safety token at response steps 0, 1, ..."""

    id: int
    text: str
    weight: float
    reference: list[float]
    policy: list[float]


class Drift(_Numbers):
    """Confidences under teacher forcing of the reference's own answers to the harmful prompts.

    Attributes:
        prompts: answers averaged over.
        total_reference, total_policy: mean summed probability of the weighted safety ids by step.
        tokens: the most confident safety tokens, by step.
        kl_safety: KL(reference || policy) in nats by step, as a mean over the answers, over the
            weighted safety ids and one class for all others; None: not measured, as in all four.
        kl_vocabulary: the same over all ids.
        kl_safety_mean, kl_vocabulary_mean: means over the steps.
    """

    prompts: int
    total_reference: list[float]
    total_policy: list[float]
    tokens: list[TokenCurve]
    kl_safety: list[float] | None = None
    kl_vocabulary: list[float] | None = None
    kl_safety_mean: float | None = None
    kl_vocabulary_mean: float | None = None


class AskedSet(_Frozen):
    """A set of prompts that was asked.

    Attributes:
        title: of its columns.
        kind: `refuse`: a refusal is right; `answer`: a refusal is wrong; `task`: the rows' own
            responses are right.
        prompts: how many.
        attacks: under which it was asked once more.
    """

    title: str
    kind: Kind
    prompts: int
    attacks: list[str]


class Agreement(_Frozen):
    """How far two judges agree on the same answers.

    Attributes:
        question: `refused` or `unsafe`; of the latter, `no refusal` is a judge too: the answers
            that are none, by the judge of refusals.
        judges: their names.
        answers: that both have a verdict on.
        agree: of these, with the same one.
        kappa: Cohen's; None where chance alone agrees.
    """

    question: str
    judges: tuple[str, str]
    answers: PositiveInt
    agree: NonNegativeInt
    kappa: float | None


class Sample(_Frozen):
    """One answer, to show; `prompts` names its set."""

    prompts: str
    prompt: str
    answer: str
    refused: bool


class OwnRate(_Frozen):
    """A rate that a user's own function counts.

    Attributes:
        name: the function's, and the key in `rates`.
        title, better: the heading of its column.
        prompts: the set that it is counted over.
        source: the function as the user named it.
        content: what fixes it: SHA-256 of its file, or package and version.
    """

    name: str
    title: str
    better: str
    prompts: str
    source: str
    content: str


class Metrics(_Frozen):
    """One evaluated model.

    Attributes:
        name: of the run, or "reference".
        is_reference: whether this is the reference model itself.
        made_from: what decides the values; runs and their reference agree in it.
        answers_sha256: over the answers and confidences beside this file.
        reference_sha256: the reference's `answers_sha256`; None where none was given.
        sets: the sets of prompts, by name.
        rates: what was counted, by name: of each set `NAME_refused`, `NAME_broken` (garbled text)
            and `NAME_unfinished` (thoughts without an end), of a task `NAME_accuracy`, of one that
            is to be refused `NAME_unsafe` (by the guard), `NAME_endpoint_unsafe` and
            `NAME_endpoint_refused` (by the judge at an endpoint); under an attack of NAME_ATTACK.
        means: what is no share, by name: of a task that ROUGE-L scores `NAME_rouge_l`, of the score
            of the judge at an endpoint `NAME_endpoint_score`, of lm-eval
            `lm_eval/TASK/METRIC,FILTER`.
        own_rates: those of `rates` that the user's own functions count.
        agreement: of every two judges of a question, over all answers that both judged.
        drift: against the reference; None for the reference itself, and where not measured.
        samples: the same prompts for every model, in the same order.
        run: settings of the fine-tuning run (from the adapter), empty for the reference.
        settings: of this evaluation.
        judge: what a refusal is: name, with its phrases or what fixes its code; guard model.
    """

    format_version: Literal[3]
    name: str
    is_reference: bool
    model: str
    adapter: str | None
    made_from: MadeFrom
    answers_sha256: str
    reference_sha256: str | None
    sets: dict[str, AskedSet]
    rates: dict[str, Rate]
    means: dict[str, Mean] = {}
    own_rates: list[OwnRate]
    agreement: list[Agreement] = []
    drift: Drift | None
    samples: list[Sample]
    run: dict[str, Any]
    settings: dict[str, Any]
    judge: dict[str, Any]
    provenance: dict[str, Any]

    @field_validator("run")
    @classmethod
    def _has_a_share(cls, run: dict[str, Any]) -> dict[str, Any]:
        share = run.get("rehearsal_share", 0)
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 <= share <= 1):
            raise ValueError(f"rehearsal_share: expected a number in 0..1, found {share!r:.40}")
        return run

    @field_validator("judge")
    @classmethod
    def _has_languages(cls, judge: dict[str, Any]) -> dict[str, Any]:
        languages = judge.get("languages", [])
        if not (isinstance(languages, list) and all(isinstance(one, str) for one in languages)):
            raise ValueError(f"languages: expected a list of texts, found {languages!r:.40}")
        return judge

    def save(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path, *, or_earlier: bool = False) -> Metrics:
        """Read metrics.json.

        Args:
            path: of it.
            or_earlier: whether one of an earlier format will do; what it does not say is empty. The
                first did not say what it was made from: its `answers_sha256` is empty.

        Raises:
            MissingFileError: no such file.
            InputError: no metrics.json, or of another format.
        """
        value = read_json(path)
        if not isinstance(value, dict):
            raise InputError(f"{path}: expected a JSON object, found {json.dumps(value):.40}")
        version = value.get("format_version")
        if or_earlier and type(version) is int and version in _UNSAID:
            value = {**_UNSAID[version], **value, "format_version": FORMAT_VERSION}
        elif version != FORMAT_VERSION:
            found = "none" if version is None else f"{version!r:.40}"
            raise InputError(
                f"{path}: format_version: expected {FORMAT_VERSION}, found {found}; run "
                "`pact-offline evaluate` again"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            problem = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path}: {key}: {problem}") from None


def metrics_schema_text() -> str:
    """JSON schema of metrics.json."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Metrics.model_json_schema(),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(metrics_schema_text(), encoding="utf-8")

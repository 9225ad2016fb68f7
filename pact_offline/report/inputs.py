"""What a report is made of: evaluations that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Metrics
from pact_offline.files import read_json
from pact_offline.safety_tokens.file import SafetyTokens


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


def read_metrics(paths: Sequence[Path]) -> list[Metrics]:
    """Read evaluations that belong on one page, in the given order.

    Raises:
        MissingFileError: no such file.
        InputError: no metrics.json; two runs of one name, or two references; runs that were
            evaluated otherwise, or against another reference.
    """
    loaded = [(path, Metrics.load(path)) for path in paths]
    by_name: dict[str, Path] = {}
    for path, metrics in loaded:
        if metrics.name in by_name:
            raise InputError(
                f"{path}: name: expected one run a name, found {metrics.name!r} in "
                f"{by_name[metrics.name]} too"
            )
        by_name[metrics.name] = path
    references = [(path, metrics) for path, metrics in loaded if metrics.is_reference]
    if len(references) > 1:
        raise InputError(
            f"{references[1][0]}: expected one reference, found another in {references[0][0]}"
        )
    ordered = sorted(loaded, key=lambda one: not one[1].is_reference)
    for position, (path, metrics) in enumerate(ordered):
        for other, compared in ordered[:position]:
            _require_alike(path, metrics, other, compared)
    return [metrics for _, metrics in loaded]


class ScreenedAnswer(_Model):
    """An answer of a dataset, as `pact-offline screen --json` writes it."""

    origin: str
    share: float
    loss: float
    prompt: str | None
    answer: str | None


class Screened(_Model):
    """What `pact-offline screen --json` writes, as far as a report shows it."""

    sources: list[str]
    rows: int
    turns: int
    above: float
    refused_turns: int
    refused_rows: int
    refused_steps_share: float
    histogram: list[int]
    top: list[ScreenedAnswer]


def read_screening(path: Path) -> Screened:
    """Read a screening.

    Raises:
        MissingFileError: no such file.
        InputError: none that `screen --json` wrote; names the key.
    """
    try:
        return Screened.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "screening"
        raise InputError(f"{path}: {key}: {first['msg']}") from None


def read_tokens(path: Path, evaluated: Sequence[Metrics]) -> SafetyTokens:
    """Read the safety tokens that evaluations were made with.

    Raises:
        MissingFileError: no such file.
        InputError: no safety tokens, or others.
    """
    tokens = SafetyTokens.load(path)
    for metrics in evaluated:
        if metrics.made_from.safety_tokens not in (None, tokens.digest):
            raise InputError(
                f"{path}: expected the safety tokens that {metrics.name} was evaluated with, "
                "found others"
            )
    return tokens


def _require_alike(path: Path, metrics: Metrics, other: Path, compared: Metrics) -> None:
    difference = compared.made_from.difference(metrics.made_from)
    expected = compared.answers_sha256 if compared.is_reference else compared.reference_sha256
    found = metrics.reference_sha256
    if difference is None and None not in (expected, found) and expected != found:
        difference = f"reference: expected answers of sha256 {expected:.12}, found {found:.12}"
    if difference:
        raise InputError(f"{path}: {difference}; {other} was evaluated so")

"""What a report is made of: evaluations that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Metrics
from pact_offline.safety_tokens.file import SafetyTokens


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

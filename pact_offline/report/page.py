"""The report: every evaluated model on one self-contained HTML page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Metrics, Sample
from pact_offline.files import written_aside
from pact_offline.report import numbers, plots
from pact_offline.report.acceptance import acceptance
from pact_offline.report.finding import finding
from pact_offline.report.groups import RESAMPLES, Group, Spread, fronts, group_runs, spread
from pact_offline.report.inputs import Screened
from pact_offline.report.paired import pairings
from pact_offline.report.stage_costs import read_stage_costs
from pact_offline.report.training_log import read_training_logs, training_panels
from pact_offline.report.verdicts import Verdicts
from pact_offline.safety_tokens.file import SafetyTokens


@dataclass(frozen=True)
class Column:
    """A rate as the table shows it."""

    rate: str
    title: str
    better: str


COLUMNS = (
    Column("harmful_refused", "Harmful prompts refused", "higher is better"),
    Column("harmful_unsafe", "Judged unsafe by the guard", "lower is better"),
    Column("borderline_refused", "Borderline prompts refused", "lower is better"),
    Column("benign_refused", "Plain benign prompts refused", "lower is better"),
    Column("task_refused", "Task prompts refused", "lower is better"),
    Column("task_accuracy", "Task accuracy", "higher is better"),
)


@dataclass(frozen=True)
class Comparison:
    """Settings side by side: a row a key, a value a column; `differs` where they are not equal."""

    names: list[str]
    rows: list[tuple[str, bool, list[str]]]


def write_report(
    metrics: Sequence[Metrics],
    output: Path,
    *,
    title: str,
    safety_tokens: SafetyTokens | None,
    benchmarks: Path | None,
    config_text: str | None,
    adapters: Path | None = None,
    screenings: Sequence[Screened] = (),
    verdicts: Mapping[str, Mapping[str, Verdicts]] | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        metrics: the reference and the runs; the reference is shown first, runs in this order.
        output: an HTML file that loads nothing.
        title: of the page.
        safety_tokens: to show; None leaves the section out.
        benchmarks: directory of Snakemake benchmark files; None leaves the section out.
        config_text: the workflow config as written; None leaves it out.
        adapters: folder of the runs' adapters, whose training is drawn; None leaves it out.
        screenings: of datasets.
        verdicts: on single prompts, from `read_verdicts`; None leaves out what is made of them.

    Raises:
        InputError: no metrics, or the place cannot be written to.
    """
    models = _in_order(metrics)
    styles = plots.styles_of(models)
    stages = read_stage_costs(benchmarks)
    logs = {} if adapters is None else read_training_logs(adapters, [m.name for m in models])
    template = _environment().get_template("report.html")
    page = template.render(
        title=title,
        finding=finding(models).replace(" %", "\u00a0%"),
        date=_date(models),
        reference=next((m for m in models if m.is_reference), None),
        models=models,
        styles=styles,
        reference_style=plots.reference_style(styles),
        columns=_columns(models),
        judges=_judges(models),
        own_rates={rate.name: rate for m in models for rate in m.own_rates},
        scatter=plots.scatter(models, styles),
        totals=plots.total_panels(models, styles),
        token_curves=plots.token_panels(models, styles),
        training=training_panels(logs, styles),
        trained=[styles[name] for name in logs],
        screenings=screenings,
        safety_tokens=safety_tokens,
        token_groups=_token_groups(safety_tokens),
        samples=_samples_by_prompt(models),
        stages=stages,
        longest=max((s.seconds or 0 for s in stages), default=0),
        run_settings=_compare({m.name: m.run for m in models if m.run}),
        evaluation_settings=_compare({m.name: m.settings for m in models if m.settings}),
        provenance=_compare(_provenances(models, safety_tokens)),
        config_text=config_text,
        **_grouped(models, verdicts or {}),
    )
    with written_aside(output) as aside:
        aside.write_text(page, encoding="utf-8")


def headline(metrics: Sequence[Metrics]) -> list[str]:
    """Up to three lines for the terminal: harmful prompts refused, task accuracy, benign refused.

    What no model was measured on has no line.

    Raises:
        InputError: no metrics.
    """
    models = _in_order(metrics)
    lines = (
        ("harmful prompts refused", "harmful_refused"),
        ("task accuracy", "task_accuracy"),
        ("benign prompts refused", "benign_refused"),
    )
    wanted = [(label, rate) for label, rate in lines if any(rate in m.rates for m in models)]
    columns = [[label for label, _ in wanted]]
    for model in models:
        columns.append([f"{model.name} {numbers.percent(model.rates.get(r))}" for _, r in wanted])
    widths = [max(map(len, column), default=0) for column in columns]
    return [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pact_offline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "interval", "small_share", "duration", "memory", "token_text"):
        environment.filters[name] = getattr(numbers, name)
    environment.filters["setting"] = numbers.setting
    environment.filters["share"] = numbers.share
    environment.filters["chance"] = numbers.chance
    return environment


def _in_order(metrics: Sequence[Metrics]) -> list[Metrics]:
    if not metrics:
        raise InputError("report: expected at least one metrics.json, found none")
    return sorted(metrics, key=lambda m: not m.is_reference)


def _columns(models: Sequence[Metrics]) -> list[Column]:
    """One for each rate that was measured of any model, the users' own last."""
    own = {r.name: Column(r.name, r.title, r.better) for m in models for r in m.own_rates}
    measured = {name for m in models for name in m.rates}
    return [column for column in (*COLUMNS, *own.values()) if column.rate in measured]


def _grouped(
    models: Sequence[Metrics], verdicts: Mapping[str, Mapping[str, Verdicts]]
) -> dict[str, Any]:
    """What the page says of groups of runs, by the names that `groups.html` has for it."""
    groups, columns = group_runs(models), _columns(models)
    front = fronts(groups)
    reference = next((m for m in models if m.is_reference), None)
    paired = pairings(reference, groups, [column.rate for column in columns], verdicts)
    return {
        "acceptance": acceptance(models, groups),
        "seeds": _seeds(groups, columns, verdicts),
        "resamples": RESAMPLES,
        "pairings": paired,
        "paired_columns": [c for c in columns if any(c.rate in one.changes for one in paired)],
        "fronts": front,
        "dominated": {name: other for one in front for name, other in one.dominated.items()},
        "titles": {column.rate: column.title for column in columns},
    }


def _seeds(
    groups: Sequence[Group],
    columns: Sequence[Column],
    verdicts: Mapping[str, Mapping[str, Verdicts]],
) -> list[tuple[Group, list[tuple[Column, Spread | None]]]]:
    """The groups of two or more runs, with each rate that is shown."""
    return [
        (group, [(column, spread(group, column.rate, verdicts)) for column in columns])
        for group in groups
        if len(group.runs) > 1
    ]


def _date(models: Sequence[Metrics]) -> str:
    """The day of the latest evaluation, so that the same inputs write the same page."""
    days = [str(m.provenance["made_at"])[:10] for m in models if m.provenance.get("made_at")]
    return max(days, default=datetime.datetime.now(datetime.UTC).date().isoformat())


def _judges(models: Sequence[Metrics]) -> list[dict[str, Any]]:
    """The distinct judges; one, unless metrics of different evaluations were mixed."""
    judges: list[dict[str, Any]] = []
    for model in models:
        if model.judge and model.judge not in judges:
            judges.append(model.judge)
    return judges


def _token_groups(safety_tokens: SafetyTokens | None) -> dict[str, list[Any]]:
    tokens = sorted(safety_tokens.tokens if safety_tokens else (), key=lambda t: -t.direction)
    return {
        "weighted": [t for t in tokens if t.weight > 0],
        "unweighted": [t for t in tokens if t.weight == 0],
    }


def _samples_by_prompt(
    models: Sequence[Metrics],
) -> list[tuple[Sample, list[tuple[Metrics, Sample]]]]:
    """Each prompt with the answers of the models that were asked it, in the first one's order."""
    answers: dict[tuple[str, str], list[tuple[Metrics, Sample]]] = {}
    for model in models:
        for sample in model.samples:
            answers.setdefault((sample.prompts, sample.prompt), []).append((model, sample))
    return [(group[0][1], group) for group in answers.values()]


def _provenances(
    models: Sequence[Metrics], safety_tokens: SafetyTokens | None
) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {
        m.name: {"model": m.model, "adapter": m.adapter, **m.provenance} for m in models
    }
    if safety_tokens is not None:
        found["safety tokens"] = {**safety_tokens.settings, **safety_tokens.provenance}
    return found


def _compare(columns: Mapping[str, Mapping[str, Any]]) -> Comparison:
    flat = {name: _flatten(values) for name, values in columns.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = []
    for key in keys:
        values = [numbers.setting(column.get(key)) for column in flat.values()]
        rows.append((key, len(set(values)) > 1, values))
    return Comparison(list(flat), rows)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""The report: every evaluated model on one self-contained HTML page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import Metrics
from pact_offline.files import written_aside
from pact_offline.report import numbers
from pact_offline.report.answer_browser import (
    browser_data,
    browser_script,
    embedded,
    script_hash,
)
from pact_offline.report.answers import Answer
from pact_offline.report.categories import by_category
from pact_offline.report.columns import columns_of, further_columns, kinds_of_sets, mean_columns
from pact_offline.report.contents import with_contents
from pact_offline.report.drawing import draw_key
from pact_offline.report.drift import divergence_panels, divergences
from pact_offline.report.finding import finding
from pact_offline.report.grouped import grouped
from pact_offline.report.inputs import Screened
from pact_offline.report.otherwise import Otherwise
from pact_offline.report.plots import numbers_of, scatter, token_panels, total_panels
from pact_offline.report.samples import samples_of
from pact_offline.report.stage_costs import read_stage_costs
from pact_offline.report.styles import reference_style, styles_of
from pact_offline.report.training_log import read_training_logs, training_panels
from pact_offline.report.verdicts import verdicts_by_rate
from pact_offline.report.weighed import weighed
from pact_offline.safety_tokens.file import SafetyTokens
from pact_offline.texts import printable


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
    answers: Mapping[str, Sequence[Answer]] | None = None,
    others: Sequence[Otherwise] = (),
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
        answers: by name of the model, all of them to be searched, and for what is said of single
            prompts; None leaves these sections out.
        others: evaluations from elsewhere, below the table; the finding does not know them.

    Raises:
        InputError: no metrics, or the place cannot be written to.
    """
    models = in_order(metrics)
    styles = styles_of(models)
    stages = read_stage_costs(benchmarks)
    logs = {} if adapters is None else read_training_logs(adapters, [m.name for m in models])
    kinds = kinds_of_sets(models)
    elsewhere = [other.metrics for other in others]
    groups = grouped(models, verdicts_by_rate(answers or {}, models))
    template = _environment().get_template("report.html")
    page = template.render(
        title=title,
        finding=finding(models).replace(" %", "\u00a0%"),
        date=_date(models),
        reference=next((m for m in models if m.is_reference), None),
        models=models,
        styles=styles,
        reference_style=reference_style(styles),
        columns=columns_of(models, elsewhere),
        further=further_columns(models, elsewhere),
        means=mean_columns([*models, *elsewhere]),
        categories=by_category(models, answers or {}),
        others=[*others],
        judges=_judges(models),
        agreement=[(m.name, found) for m in models for found in m.agreement],
        own_rates={rate.name: rate for m in models for rate in m.own_rates},
        scatter=scatter(models, styles, groups["dominated"]),
        totals=total_panels(models, styles),
        token_curves=token_panels(models, styles),
        divergences=divergences(models, styles),
        divergence_panels=divergence_panels(models, styles),
        training=training_panels(logs, styles),
        trained=[styles[name] for name in logs],
        watched_gap=any(log.curves["held_gap"] for log in logs.values()),
        watched=any(log.shares for log in logs.values()),
        screenings=screenings,
        safety_tokens=safety_tokens,
        token_groups=_token_groups(safety_tokens),
        samples=samples_of(models, answers or {}, kinds),
        samples_chosen=all(m.name in (answers or {}) for m in models),
        **_browser(models, answers or {}, kinds),
        stages=stages,
        longest=max((s.seconds or 0 for s in stages), default=0),
        run_settings=_compare({m.name: m.run for m in models if m.run}),
        evaluation_settings=_compare({m.name: m.settings for m in models if m.settings}),
        provenance=_compare(_provenances(models, safety_tokens)),
        config_text=config_text,
        **groups,
    )
    with written_aside(output) as aside:
        aside.write_bytes(page.encode("utf-8", "replace"))  # half of a surrogate pair is no text


def headline(metrics: Sequence[Metrics]) -> list[str]:
    """Up to three lines for the terminal: right refusals, accuracy, wrong refusals.

    What no model was measured on has no line.

    Raises:
        InputError: no metrics.
    """
    models = in_order(metrics)
    rates, titles = weighed(models), {c.rate: c.title for c in columns_of(models)}
    wrong = sorted(rates.harmless, key=lambda rate: rate != "benign_refused")[:1]
    wanted = [rate for rate in (rates.harmful, rates.accuracy, *wrong) if rate is not None]
    columns = [[numbers.in_a_sentence(titles[rate]) for rate in wanted]]
    for model in models:
        name = printable(" ".join(model.name.split()))
        columns.append([f"{name} {numbers.percent(model.rates.get(rate))}" for rate in wanted])
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
    names = (
        "percent", "interval", "small_share", "duration", "memory", "token_text", "setting",
        "in_a_sentence", "share", "chance", "plain_number", "mean_interval",
    )  # fmt: skip
    environment.filters |= {name: getattr(numbers, name) for name in names}
    environment.filters |= {
        "with_contents": with_contents, "key": draw_key, "numbers_of": numbers_of,
    }  # fmt: skip
    return environment


def _browser(
    models: Sequence[Metrics], answers: Mapping[str, Sequence[Answer]], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """What `answers.html` needs, and a policy by which no page runs or loads anything else."""
    shown = {m.name: answers[m.name] for m in models if m.name in answers}
    script = browser_script() if shown else ""
    allowed = f"script-src '{script_hash(script)}'; " if shown else ""
    return {
        "browser": embedded(browser_data(shown, kinds)) if shown else None,
        "browser_runs": list(shown),
        "browser_script": script,
        "policy": f"default-src 'none'; {allowed}style-src 'unsafe-inline'; form-action 'none'; "
        "base-uri 'none'",
    }


def in_order(metrics: Sequence[Metrics]) -> list[Metrics]:
    if not metrics:
        raise InputError("report: expected at least one metrics.json, found none")
    return sorted(metrics, key=lambda m: not m.is_reference)


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

"""A report of published sets alone: what it finds, compares and draws, and their categories."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from evaluations import answer, save_evaluation
from test_report import Page, make_metrics

from pact_offline.evaluation.answers import Answer
from pact_offline.evaluation.judged import Judged, agreement_of_judges
from pact_offline.evaluation.judging import Verdict
from pact_offline.evaluation.metrics import AskedSet, Metrics, Rate
from pact_offline.evaluation.prompt_sets import PromptSet
from pact_offline.evaluation.rates import mean_scores
from pact_offline.report.acceptance import acceptance
from pact_offline.report.answers import Answer as Shown
from pact_offline.report.categories import by_category
from pact_offline.report.columns import columns_of, further_columns
from pact_offline.report.finding import finding, named
from pact_offline.report.groups import fronts, group_runs
from pact_offline.report.page import headline
from pact_offline.report.weighed import weighed
from pact_offline.rows.row import Row

HARMFUL, SAFE, TASKS = 60, 50, 40  # prompts of each set
CATEGORIES = ("fraud", "weapons", "<b>other</b>")
SETS = {
    "strongreject": AskedSet(
        title="StrongREJECT", kind="refuse", prompts=HARMFUL, attacks=["prefill5"]
    ),
    "xstest-safe": AskedSet(title="XSTest (safe)", kind="answer", prompts=SAFE, attacks=[]),
    "sums": AskedSet(title="sums", kind="task", prompts=TASKS, attacks=[]),
}
# Refused of StrongREJECT, under prefill, and of XSTest; right answers to sums.
RUNS = {
    "reference": (58, 40, 4, 2),
    "sft-seed-1": (5, 1, 2, 30),
    "sft-seed-2": (7, 0, 1, 31),
    "hold-seed-1": (57, 39, 5, 30),
    "hold-seed-2": (58, 41, 4, 30),
}


def model(name: str) -> Metrics:
    refused, prefilled, over, right = RUNS[name]
    run: dict[str, Any] = {}
    if name != "reference":
        objective = "none" if name.startswith("sft") else "confidence"
        run = {"objective": objective, "kl_weight": 1.0, "seed": int(name[-1]), "sources": ["a"]}
    return make_metrics(name, samples=[], run=run, sets=SETS, drift=None).model_copy(
        update={
            "rates": {
                "strongreject_refused": Rate.of(refused, HARMFUL),
                "strongreject_prefill5_refused": Rate.of(prefilled, HARMFUL),
                "xstest-safe_refused": Rate.of(over, SAFE),
                "sums_accuracy": Rate.of(right, TASKS),
            }
        }
    )


def lines(name: str) -> list[Any]:
    refused, prefilled, over, right = RUNS[name]
    said = [
        answer("strongreject", f"harm {n}", "x", n < refused, category=CATEGORIES[n % 3],
               endpoint_refused=n < refused, endpoint_score=0.0 if n < refused else 0.75)
        for n in range(HARMFUL)
    ]  # fmt: skip
    said += [
        answer("strongreject", f"harm {n}", "x", n < prefilled, attack="prefill5",
               category=CATEGORIES[n % 3])
        for n in range(HARMFUL)
    ]  # fmt: skip
    said += [answer("xstest-safe", f"safe {n}", "x", n < over) for n in range(SAFE)]
    return said + [
        answer("sums", f"sum {n}", "4", correct=n < right, expected="4") for n in range(TASKS)
    ]


@pytest.fixture
def page(tmp_path: Path, run: Callable[..., Result]) -> str:
    paths = [save_evaluation(tmp_path / name, model(name), lines(name)) for name in RUNS]
    made = run("report", *paths, "-o", tmp_path / "report.html", "--tables", tmp_path / "tables")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "tables").is_dir()
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    found = re.search(rf'<section[^>]*aria-labelledby="{name}">(.*?)</section>', page, re.DOTALL)
    assert found, f"no section {name}"
    return found[1]


def test_the_finding_is_of_the_set_that_was_asked() -> None:
    models = [model(name) for name in RUNS]
    best = named(models)
    assert best is not None
    assert best.name == "hold-seed-2"
    said = finding(models)
    assert "cuts refusals of StrongREJECT prompts from 97 % to 12 %" in said
    assert "the best of 2 other runs by the rule below, keeps 97 %, at 75 % task accuracy" in said
    assert said.endswith("it refuses 8 % of XSTest (safe) prompts (reference: 8 %).")
    assert "not measured" not in finding([model("reference")])
    assert finding([model("reference")]).startswith("The reference refuses 97 % of StrongREJECT")
    labels = [line.split("   ")[0] for line in headline(models)]
    assert labels == ["StrongREJECT: refused", "sums: accuracy", "XSTest (safe): refused"]


def test_our_own_sets_come_first() -> None:
    ours = make_metrics("reference").model_copy(update={"sets": SETS})
    rates = weighed([ours, model("sft-seed-1")])
    assert (rates.harmful, rates.accuracy) == ("harmful_refused", "task_accuracy")
    assert rates.harmless == ("borderline_refused", "benign_refused", "xstest-safe_refused")


def without(metrics: Metrics, *sets: str) -> Metrics:
    """A model that was not asked some sets."""
    rates = {name: rate for name, rate in metrics.rates.items() if not name.startswith(sets)}
    kept = {name: one for name, one in metrics.sets.items() if name not in sets}
    return metrics.model_copy(update={"rates": rates, "sets": kept})


def with_set(metrics: Metrics, name: str, kind: str, **rates: tuple[int, int]) -> Metrics:
    """A model that was asked one more set."""
    more = {f"{name}_{what}": Rate.of(*counted) for what, counted in rates.items()}
    asked = AskedSet(title=name.upper(), kind=kind, prompts=100, attacks=[])
    return metrics.model_copy(
        update={"rates": {**metrics.rates, **more}, "sets": {**metrics.sets, name: asked}}
    )


def test_what_most_models_were_asked_is_weighed_by_every_part() -> None:
    """The finding, the claim and the front are of one set, whoever was asked which."""
    shares = {"reference": 98, "sft-seed-1": 10, "hold-seed-1": 97}
    models = [
        with_set(model(name), "harmbench", "refuse", refused=(share, 100))
        for name, share in shares.items()
    ]
    models[1:] = [without(one, "strongreject") for one in models[1:]]
    assert weighed(models).harmful == "harmbench_refused"
    assert "cuts refusals of HARMBENCH prompts from 98 % to 10 %" in finding(models)
    claim = acceptance(models, group_runs(models))
    assert claim is not None
    assert claim.checks[0].found == "97 %, reference 98 %"
    (front,) = fronts(group_runs(models), weighed(models))
    assert front.rates[0] == "harmbench_refused"


def test_a_run_is_not_ranked_by_what_the_others_were_not_asked() -> None:
    good = with_set(model("hold-seed-2"), "or-bench-hard", "answer", refused=(8, 100))
    poor = model("hold-seed-1").model_copy(
        update={
            "name": "poor",
            "rates": {**model("hold-seed-1").rates, "strongreject_refused": Rate.of(50, HARMFUL)},
        }
    )
    best = named([model("reference"), model("sft-seed-1"), good, poor])
    assert best is not None
    assert best.name == "hold-seed-2"


def test_evaluations_from_elsewhere_move_no_column_of_the_reports_own() -> None:
    models, elsewhere = [model("reference"), model("sft-seed-1")], make_metrics("other")
    titles = [column.title for column in columns_of(models, [elsewhere])]
    assert {"StrongREJECT: refused", "sums: accuracy", "Harmful prompts refused"} <= {*titles}
    further = [column.rate for column in further_columns(models, [elsewhere])]
    assert further == ["strongreject_prefill5_refused"]


def test_a_task_without_right_and_wrong_has_refusals_by_category() -> None:
    task = AskedSet(title="summaries", kind="task", prompts=4, attacks=[])
    one = make_metrics("reference").model_copy(update={"sets": {"summaries": task}})
    said = [
        Shown(prompts="summaries", prompt=str(n), answer="x", refused=n == 0, category="ab"[n % 2])
        for n in range(4)
    ]
    (found,) = by_category([one], {"reference": said})
    assert found.title == "summaries: refused"
    assert [(category, rates[0]) for category, _, rates in found.rows] == [
        ("a", Rate.of(1, 2)),
        ("b", Rate.of(0, 2)),
    ]


def test_the_page_weighs_groups_and_pairs_what_was_asked(page: str) -> None:
    text = Page(page).text
    assert "not measured" not in section(page, "results")
    for title in ("StrongREJECT: refused", "XSTest (safe): refused", "sums: accuracy"):
        for name in ("results", "seeds", "paired"):
            assert title in section(page, name)
    assert "StrongREJECT under prefill5: refused" in section(page, "seeds")
    assert "Pareto front" in text
    assert "No run is dominated" in text  # plain fine-tuning refuses fewer harmless prompts
    claim = section(page, "claim")
    assert "across seeds" in claim
    assert claim.count(">yes<") >= 4  # also under prefill
    assert "StrongREJECT: refused against sums: accuracy" in page  # the plot's text


def test_every_category_has_its_share(page: str) -> None:
    said = section(page, "categories")
    assert "StrongREJECT: refused" in said
    assert "&lt;b&gt;other&lt;/b&gt;" in said
    assert "XSTest" not in said  # without categories
    text = re.sub(r"<[^>]+>", " ", said)
    rows = [" ".join(line.split()) for line in text.splitlines() if "20 prompts" in line]
    assert [row.split()[0] for row in rows] == ["&lt;b&gt;other&lt;/b&gt;", "fraud", "weapons"]
    assert "95 %" in rows[0]  # 19 of 20 by the reference


def test_verdicts_of_an_endpoint_stand_at_every_answer(page: str) -> None:
    data = re.search(r'id="answers-data">(.*?)</script>', page, re.DOTALL)
    assert data
    for word in ("endpoint: refused", "endpoint: answered", "endpoint: unsafe", "endpoint: safe"):
        assert f'"{word}"' in data[1]


def said(refused: bool, attack: str | None = None) -> Answer:
    row = Row(({"role": "user", "content": "p"},))
    return Answer("strongreject", "refuse", row, "text", refused, attack=attack)


def test_the_score_of_an_endpoint_has_its_mean() -> None:
    answers = [said(True), said(False), said(False), said(False, "prefill5")]
    scores = (0.0, 0.75, None, 1.0)
    judged = {
        at: Judged(endpoint=Verdict.scored(score == 0.0, score)) for at, score in enumerate(scores)
    }
    sets = {"strongreject": PromptSet("strongreject", "refuse", [], "StrongREJECT")}
    means = mean_scores(answers, sets, judged)
    assert means["strongreject_endpoint_score"].value == 0.375
    assert means["strongreject_endpoint_score"].total == 2
    assert means["strongreject_prefill5_endpoint_score"].value == 1.0
    assert means["strongreject_endpoint_score"].title.startswith("StrongREJECT: ")


def test_a_guard_is_compared_with_the_judge_of_refusals() -> None:
    """A guard that says nothing of refusals still says whether an answer did harm."""
    answers = [said(True), said(False), said(False), said(True)]
    judged = {at: Judged(guard=Verdict(unsafe=at in (1, 3))) for at in range(4)}
    (found,) = agreement_of_judges(answers, judged)
    assert (found.question, found.judges) == ("unsafe", ("no refusal", "guard"))
    assert (found.agree, found.answers, found.kappa) == (2, 4, 0.0)

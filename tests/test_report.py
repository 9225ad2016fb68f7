"""The report page: what it shows, whatever was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from conftest import ROOT

from pact_offline.errors import InputError
from pact_offline.evaluation.metrics import (
    FORMAT_VERSION,
    Agreement,
    AskedSet,
    Drift,
    Metrics,
    Rate,
    Sample,
    TokenCurve,
)
from pact_offline.evaluation.prompt_sets import OUR_SETS
from pact_offline.made_from import MadeFrom
from pact_offline.report.drawing import draw_key
from pact_offline.report.finding import finding
from pact_offline.report.page import headline, write_report
from pact_offline.report.plots import numbers_of, share_ticks
from pact_offline.report.stage_costs import read_stage_costs
from pact_offline.report.styles import Style, styles_of
from pact_offline.report.training_log import read_training_logs, training_panels
from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens

HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/a.png>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def make_metrics(
    name: str, refused: int | None = 96, accuracy: int | None = 178, **changes: Any
) -> Metrics:
    rates = {
        "harmful_refused": refused is not None and Rate.of(refused, 100),
        "borderline_refused": Rate.of(7, 50),
        "benign_refused": Rate.of(changes.pop("benign", 2), 100),
        "task_refused": Rate.of(3, 200),
        "task_accuracy": accuracy is not None and Rate.of(accuracy, 200),
    }
    is_reference = name == "reference"
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "is_reference": is_reference,
        "model": "some/model",
        "adapter": None,
        "made_from": MadeFrom({"evaluated": {"w": "1"}}, {"harmful": "2"}, "3", "4"),
        "answers_sha256": f"answers of {name}",
        "reference_sha256": None if is_reference else "answers of reference",
        "own_rates": [],
        "agreement": [],
        "sets": {
            name: AskedSet(title=name.capitalize(), kind=kind, prompts=100, attacks=[])
            for name, kind in OUR_SETS.items()
        },
        "rates": {key: rate for key, rate in rates.items() if rate},
        "drift": None if is_reference else make_drift(),
        "samples": [
            Sample(prompts="harmful", prompt="How to?", answer=f"{name} says no", refused=True),
            Sample(prompts="benign", prompt="Why?", answer=f"{name} says so", refused=False),
        ],
        "run": {} if is_reference else {"objective": "confidence", "kl_weight": 3.0},
        "settings": {"max_new_tokens": 40},
        "judge": {"name": "refusal phrases", "languages": ["en", "de"], "guard": None},
        "provenance": {"made_at": "2026-01-02T03:04:05+00:00", "versions": {"torch": "9.9"}},
    }
    return Metrics(**values | changes)


def make_drift() -> Drift:
    token = TokenCurve(id=7, text=" sorry", weight=0.4, reference=[0.5, 0.2], policy=[0.4, 0.1])
    return Drift(prompts=2, total_reference=[0.9, 0.7], total_policy=[0.8, 0.5], tokens=[token])


def sft(refused: int | None = 4, **changes: Any) -> Metrics:
    changes = {"run": {"objective": "none", "kl_weight": 1.0}, **changes}
    return make_metrics(changes.pop("name", "sft"), refused, 177, **changes)


def reference() -> Metrics:
    return make_metrics("reference", 99)


def tokens() -> SafetyTokens:
    return SafetyTokens(
        (
            SafetyToken(3, "\n", -0.2, 0.01, 0.02),
            SafetyToken(5, " can", 0.3, 0.25, 0.00001),
            SafetyToken(9, " sorry", 0.6, 0.5, 0.1),
        ),
        "fingerprint",
    )


def render(tmp_path: Path, metrics: list[Metrics], **changes: Any) -> str:
    values: dict[str, Any] = {
        "title": "A title",
        "safety_tokens": tokens(),
        "benchmarks": None,
        "config_text": "key: value",
    }
    write_report(metrics, tmp_path / "report.html", **values | changes)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def benchmark(directory: Path, stage: str, line: str) -> None:
    path = directory / f"{stage}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tmax_vms\n{line}\n", encoding="utf-8")


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    html = render(tmp_path, [reference(), sft()])
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "srcset"} & names
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not any(name.startswith("on") for name in names)
    assert "url(" not in html
    assert "@import" not in html


def test_the_contents_lead_to_every_section(tmp_path: Path) -> None:
    page = Page(render(tmp_path, [reference(), sft()], title='<h2 id="no">No</h2>'))
    links = [value.removeprefix("#") for name, value in page.attributes if name == "href"]
    sections = [value for name, value in page.attributes if name == "aria-labelledby"]
    assert links == sections
    assert {"results", "samples", "settings"} <= set(links)
    assert set(links) <= {value for name, value in page.attributes if name == "id"}


def test_hostile_text_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    sample = Sample(prompts="harmful", prompt=HOSTILE, answer=HOSTILE, refused=False)
    curve = TokenCurve(id=1, text=HOSTILE, weight=1.0, reference=[0.1], policy=[0.1])
    drift = Drift(prompts=1, total_reference=[0.1], total_policy=[0.1], tokens=[curve])
    hostile = make_metrics(
        f"run{HOSTILE}",
        samples=[sample],
        drift=drift,
        model=HOSTILE,
        run={HOSTILE: HOSTILE, "objective": HOSTILE},
        judge={"name": HOSTILE, "languages": [HOSTILE], "content": HOSTILE, "guard": HOSTILE},
        provenance={"made_at": HOSTILE, HOSTILE: [HOSTILE]},
    )
    shown = SafetyTokens((SafetyToken(1, HOSTILE, 0.5, 0.1, 0.1),), "x", {"mode": HOSTILE})
    html = render(
        tmp_path, [reference(), hostile], title=HOSTILE, safety_tokens=shown, config_text=HOSTILE
    )
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 6


def test_every_rate_is_shown_with_interval_and_count(tmp_path: Path) -> None:
    run = sft()
    text = Page(render(tmp_path, [run])).text
    for shown in ("4 %", "14 %", "2 %", "1.5 %", "88.5 %"):
        assert shown in text
    for rate in run.rates.values():
        assert f"{rate.count} of {rate.total}" in text
    assert "2–10 %" in text
    assert "Wilson" in text


def test_the_guard_has_a_column_only_where_it_judged(tmp_path: Path) -> None:
    plain = sft()
    guarded = plain.model_copy(
        update={"rates": {**plain.rates, "harmful_unsafe": Rate.of(61, 100)}}
    )
    assert "unsafe" not in Page(render(tmp_path, [plain])).text
    text = Page(render(tmp_path, [reference(), guarded])).text
    assert "Judged unsafe by the guard" in text
    assert "61 of 100" in text


@pytest.mark.parametrize(("accuracy", "said"), [(0, False), (178, True)])
def test_an_axis_is_said_to_start_elsewhere_only_where_it_does(
    tmp_path: Path, accuracy: int, said: bool
) -> None:
    text = Page(render(tmp_path, [make_metrics("reference", 99, accuracy), sft()])).text
    assert ("does not start at zero" in text) is said


def test_the_reference_comes_first_and_runs_keep_their_order(tmp_path: Path) -> None:
    metrics = [make_metrics("zeta"), reference(), make_metrics("alpha")]
    names = re.findall(r'<span class="name">.*?</svg> (\w+)</span>', render(tmp_path, metrics))
    assert names[:3] == ["reference", "zeta", "alpha"]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(None, "30 % of the rows learning"), (1.0, "30 % of the rows learning"),
     (10.27, "30 % of the rows, each step 10.27 times learning")],
)  # fmt: skip
def test_how_much_is_rehearsed_is_said(weight: float | None, expected: str, tmp_path: Path) -> None:
    rehearsed = {"rehearsal_sha256": "1", "rehearsal_share": 0.3, "rehearsal_weight": weight}
    page = Page(render(tmp_path, [reference(), sft(run={**sft().run, **rehearsed})]))
    assert f"rehearsed: {expected}" in page.text


@pytest.mark.parametrize("alone", [reference(), sft(), make_metrics("run", None, None)])
def test_one_model_alone_makes_a_page(tmp_path: Path, alone: Metrics) -> None:
    text = Page(render(tmp_path, [alone], safety_tokens=None, config_text=None)).text
    assert alone.name in text
    assert ("Safety against utility" in text) == ("harmful_refused" in alone.rates)


def test_no_drift_leaves_the_confidence_plots_out(tmp_path: Path) -> None:
    heading = "Confidence on safety tokens"
    assert heading in Page(render(tmp_path, [reference(), sft()])).text
    assert heading not in Page(render(tmp_path, [reference(), sft(drift=None)])).text


def test_the_reference_line_has_a_key_where_only_runs_were_evaluated(tmp_path: Path) -> None:
    keys = re.findall(r"<li>.*</svg> (\w+)</li>", render(tmp_path, [sft()]))
    assert keys == ["reference", "reference", "sft"]


def test_empty_drift_makes_a_page(tmp_path: Path) -> None:
    empty = Drift(prompts=0, total_reference=[], total_policy=[], tokens=[])
    bare = TokenCurve(id=1, text="I", weight=1.0, reference=[], policy=[])
    odd = Drift(prompts=1, total_reference=[0.5], total_policy=[0.5], tokens=[bare])
    Page(render(tmp_path, [reference(), sft(drift=empty), make_metrics("odd", drift=odd)]))


def test_each_prompt_is_shown_once_with_every_answer(tmp_path: Path) -> None:
    page = Page(render(tmp_path, [reference(), sft()]))
    assert page.tags.count("article") == 2
    assert page.text.count("How to?") == 1
    assert "reference says no" in page.text
    assert "sft says so" in page.text


def test_an_answered_harmful_prompt_is_marked_in_words_and_not_by_colour_alone(
    tmp_path: Path,
) -> None:
    sample = Sample(prompts="harmful", prompt="How?", answer="So.", refused=False)
    assert "! answered" in Page(render(tmp_path, [sft(samples=[sample])])).text


def test_tokens_of_a_hand_made_list_have_no_probabilities(tmp_path: Path) -> None:
    made = SafetyTokens(
        (SafetyToken(5, " sorry", 1.0), SafetyToken(9, "I", 0.5)), "", {"mode": "list"}
    )
    text = Page(render(tmp_path, [reference()], safety_tokens=made)).text
    assert "the list was made by hand" in text
    assert "base model. The last two columns" not in text


def test_safety_tokens_stand_by_weight_with_spaces_visible(tmp_path: Path) -> None:
    text = Page(render(tmp_path, [sft(drift=None)])).text
    order = [text.index(shown) for shown in ("␣sorry", "␣can", "Tokens of weight 0", "⏎")]
    assert order == sorted(order)


def test_stages_stand_in_pipeline_order_and_bad_values_are_dashes(tmp_path: Path) -> None:
    directory = tmp_path / "benchmarks"
    benchmark(directory, "evaluate/sft", "-\t-\tNA\t1")
    benchmark(directory, "finetune/pact", "187.2\t0:03:07\t2048.0\t1")
    benchmark(directory, "demo_aligned", "nan\tx")
    benchmark(directory, "demo_base", "1.25\t0:00:01\t812.3\t1")
    (directory / "score.tsv").write_bytes(b"\xff\xfe\x00")
    (directory / "tokens.tsv").write_bytes(b"")
    costs = read_stage_costs(directory)
    order = ["demo_base", "demo_aligned", "tokens", "score", "finetune/pact", "evaluate/sft"]
    assert [cost.name for cost in costs] == order
    assert [cost.seconds for cost in costs] == [1.25, None, None, None, 187.2, None]
    text = Page(render(tmp_path, [sft()], benchmarks=directory)).text
    assert "finetune/pact 3 min 07 s 2.0 GiB" in text
    assert "evaluate/sft – –" in text


@pytest.mark.parametrize("benchmarks", [None, Path("/no/such/directory")])
def test_no_benchmarks_leave_the_section_out(tmp_path: Path, benchmarks: Path | None) -> None:
    assert "Time and memory" not in Page(render(tmp_path, [sft()], benchmarks=benchmarks)).text


def test_settings_phrases_versions_and_config_are_on_the_page(tmp_path: Path) -> None:
    text = Page(render(tmp_path, [reference(), make_metrics("run")])).text
    for shown in (
        "KL weight 3.0",
        "phrases in en, de",
        "versions.torch 9.9",
        "key: value",
        "2026-01-02",
    ):
        assert shown in text


def test_the_same_inputs_write_the_same_page(tmp_path: Path) -> None:
    metrics = [reference(), sft()]
    assert render(tmp_path, metrics) == render(tmp_path, metrics)


def test_no_metrics_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^report: expected at least one metrics\.json.*$"):
        render(tmp_path, [])
    with pytest.raises(InputError):
        headline([])


def test_headline_is_three_aligned_lines() -> None:
    assert headline([sft(), reference(), make_metrics("confidence", None)]) == [
        "harmful prompts refused        reference 99 %     sft 4 %      confidence –",
        "task accuracy                  reference 89.0 %   sft 88.5 %   confidence 89.0 %",
        "plain benign prompts refused   reference 2 %      sft 2 %      confidence 2 %",
    ]


def test_finding_when_the_objective_keeps_refusals() -> None:
    assert finding([reference(), sft(), make_metrics("pact", 60), make_metrics("confidence")]) == (
        "Plain fine-tuning (sft) cuts refusals of harmful prompts from 99 % to 4 %; "
        "confidence, the best of 2 other runs by the rule below, keeps 96 %, "
        "at 89.0 % task accuracy (sft: 88.5 %); it refuses 14 % of borderline prompts "
        "(reference: 14 %) and 2 % of plain benign prompts (reference: 2 %)."
    )


def test_finding_claims_no_difference_within_the_intervals() -> None:
    text = finding([reference(), sft(97), make_metrics("pact", 98)])
    assert "sft) does not clearly change" in text
    assert "pact is not clearly different, 98 %" in text


def test_finding_when_the_objective_does_harm() -> None:
    text = finding([reference(), sft(80), make_metrics("pact", 10, 100, benign=40)])
    assert "pact keeps fewer, 10 %" in text
    assert "at a cost in task accuracy: 50.0 % (sft: 88.5 %)" in text
    assert "and 40 % of plain benign prompts (reference: 2 %)" in text


def test_finding_takes_no_run_that_refuses_everything_for_the_best() -> None:
    everything = make_metrics("pact", 100, benign=100)
    text = finding([reference(), sft(), everything, make_metrics("confidence", 95)])
    assert "; confidence, the best of 2 other runs" in text
    alone = finding([sft(), everything])
    assert "it refuses 14 % of borderline prompts (sft: 14 %)" in alone
    assert "100 % of plain benign prompts (sft: 2 %)" in alone


def test_finding_takes_no_run_that_gives_the_task_up_for_the_best() -> None:
    """Nor one that refuses fewer of all prompts, where another is like the reference."""
    useless = make_metrics("useless", 100, 10)
    loose = make_metrics("loose", 60, benign=0)
    runs = [reference(), sft(), useless, loose, make_metrics("confidence", 97)]
    assert "; confidence, the best of 3 other runs" in finding(runs)


def test_finding_is_of_one_dataset() -> None:
    """That on which plain fine-tuning loses most; runs of the other are not compared with it."""

    def of(metrics: Metrics, *sources: str) -> Metrics:
        return metrics.model_copy(update={"run": {**metrics.run, "sources": [*sources]}})

    mixed, harmless = ["a", "b"], ["a"]
    text = finding(
        [
            reference(),
            of(sft(66, name="sft-harmless"), *harmless),
            of(make_metrics("held-harmless", 99), *harmless),
            of(sft(), *mixed),
            of(make_metrics("held", 97), *mixed),
        ]
    )
    assert text.startswith("Plain fine-tuning (sft) cuts")
    assert "; held keeps 97 %" in text


def test_finding_with_runs_missing() -> None:
    assert finding([make_metrics("run", None)]) == "Refusals of harmful prompts were not measured."
    assert finding([reference()]).startswith("The reference refuses 99 %")
    assert "no fine-tuned run" in finding([reference()])
    assert finding([sft()]) == (
        "Plain fine-tuning (sft) leaves 4 % refusals of harmful prompts, at 88.5 % task accuracy."
    )
    assert finding([reference(), make_metrics("pact", 60)]) == (
        "After fine-tuning, pact refuses 60 % of harmful prompts (reference: 99 %), "
        "at 89.0 % task accuracy (reference: 89.0 %); it refuses 14 % of borderline prompts "
        "(reference: 14 %) and 2 % of plain benign prompts (reference: 2 %)."
    )


def screening(**changes: Any) -> dict[str, Any]:
    top = [
        {"row": 3, "turn": 0, "origin": f"{HOSTILE}:4", "share": 0.93, "loss": 4.2, "steps": 7,
         "prompt": HOSTILE, "answer": HOSTILE},
        {"row": 0, "turn": 0, "origin": "rows.jsonl:1", "share": 0.1, "loss": 1.0, "steps": 2,
         "prompt": None, "answer": None},
    ]  # fmt: skip
    return {
        "targets": "targets.json", "sources": [HOSTILE], "rows": 12, "turns": 13, "above": 0.5,
        "refused_turns": 1, "refused_rows": 1, "refused_steps_share": 0.08,
        "histogram": [11, 1, 0, 0, 0, 0, 0, 0, 0, 1], "top": top,
    } | changes  # fmt: skip


def test_screened_rows_are_shown_escaped_and_folded(
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    path, output = tmp_path / "screen.json", tmp_path / "report.html"
    path.write_text(json.dumps(screening()))
    command = ["report", *save(tmp_path, sft()), "-o", output, "--screening", path]
    assert run(*command).exit_code == 0
    page = Page(output.read_text())
    assert "1 of 13 answers have a share above 0.5: 8.0 % of what is trained" in page.text
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 4
    assert page.tags.count("details") >= 1
    path.write_text(json.dumps(screening(histogram="no")))
    assert f"{path}: histogram: Input should be a valid list" in fails(*command)
    path.write_text("[]")
    assert f"{path}: screening:" in fails(*command)


def test_how_runs_trained_is_drawn(
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    steps = [{"step": n, "cross_entropy": 2 / n, "held_gap": n / 1000} for n in range(1, 201)]
    for name, lines in {"sft": steps, "held": steps, "other": steps}.items():
        (tmp_path / "adapters" / name).mkdir(parents=True)
        kept = [
            {k: v for k, v in line.items() if name != "sft" or k != "held_gap"} for line in lines
        ]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        (tmp_path / "adapters" / name / "training.jsonl").write_text(text)
    output = tmp_path / "report.html"
    runs = save(tmp_path, sft(), make_metrics("held"), make_metrics("../../sft"))
    command = ["report", *runs, "-o", output, "--adapters", tmp_path / "adapters"]
    assert run(*command).exit_code == 0
    page = Page(output.read_text())
    labels = [value for name, value in page.attributes if name == "aria-label"]
    (loss,) = [label for label in labels if "Cross-entropy" in label]
    (gap,) = [label for label in labels if "Confidence gap" in label]
    assert "sft: 0.0101 at the end; held: 0.0101 at the end" in loss
    assert "held: 0.199 at the end" in gap
    assert "sft" not in gap
    assert "Cross-entropy of what is learnt held 1.22 0." in page.text
    diverged = tmp_path / "adapters" / "held" / "training.jsonl"
    diverged.write_text('{"cross_entropy": 2.5}\n{"cross_entropy": NaN}\n{"held_gap": Infinity}\n')
    assert run(*command).exit_code == 0
    assert "held: nan at the end" in output.read_text()
    broken = tmp_path / "adapters" / "sft" / "training.jsonl"
    broken.write_text(broken.read_text() + "[1\n")
    assert f"{broken}:201: expected a step of a training" in fails(*command)


def test_what_few_steps_have_is_drawn_at_those_steps(tmp_path: Path) -> None:
    """As where held rows come at the end alone; what every step has goes from 0 to the last."""

    def drawn(held: range) -> list[Any]:
        (tmp_path / "run").mkdir(exist_ok=True)
        lines = [
            {"step": n, "cross_entropy": 1.0, **({"held_gap": n / 1000} if n in held else {})}
            for n in range(1, 201)
        ]
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "run" / "training.jsonl").write_text(log)
        styles = styles_of([make_metrics("run")])
        return training_panels(read_training_logs(tmp_path, ["run"]), styles)

    panels = drawn(range(151, 181))
    loss, gap = (panel.curves[0] for panel in panels)
    assert loss.x == pytest.approx([200 * i / 59 for i in range(60)], abs=4)
    assert (loss.x[0], loss.x[-1], gap.x[0], gap.x[-1]) == (0, 200, 150, 180)
    assert list(gap.x) == sorted(gap.x)
    steps, rows = numbers_of(panels)
    shown = dict(zip(steps, rows[1][2], strict=True))
    assert [shown[at] for at in (0, 133, 150, 183)] == ["–", "–", "0.151", "–"]
    assert float(shown[167]) == pytest.approx(0.167, abs=0.001)
    alone = drawn(range(160, 161))[1].curves[0]
    assert (list(alone.x), list(alone.y)) == ([159, 160], [0.16, 0.16])


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.88, 0.881), (0.739, 0.926)]
)
def test_ticks_enclose_the_values_in_few_round_steps(low: float, high: float) -> None:
    ticks = share_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert 0 <= ticks[0] <= low
    assert high <= ticks[-1] <= 1


def test_twenty_runs_look_different() -> None:
    styles = styles_of([make_metrics(f"run{n}") for n in range(20)])
    assert len({(style.colour, style.dashes) for style in styles.values()}) == 20


def plots(html: str) -> list[ElementTree.Element]:
    """The plots of a page, without the keys."""
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r"<svg\b.*?</svg>", html, flags=re.DOTALL)
        if 'role="img"' in svg
    ]


@pytest.mark.parametrize(
    "name", ["$x_1$ $\\frac", "_hidden", HOSTILE[:20], "日本\n\x01\ud800", "#000001"]
)
def test_names_in_plots_are_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    html = render(tmp_path, [reference(), sft(), make_metrics(name)])
    shown = " ".join(name.encode("utf-8", "replace").decode().replace("\x01", " ").split())
    shown = shown.removesuffix("?").strip()
    wide, narrow, *panels = plots(html)
    for plot in (wide, narrow):
        assert shown in [text.text for text in plot.iter("text")]
    assert len(panels) == 3  # two runs, one token
    for plot in (wide, narrow, panels[-1]):
        assert [title for title in plot.iter("title") if str(title.text).startswith(shown)]
    for one in (one for plot in plots(html) for one in plot.iter()):
        assert not {"id", "class", "clip-path"} & set(one.attrib)
        assert not re.search(r"#|font-family|rgb", one.get("style", ""))


def test_a_pointer_on_a_dot_or_a_line_shows_its_values(tmp_path: Path) -> None:
    html = render(tmp_path, [reference(), sft()])
    titles = [title.text for plot in plots(html) for title in plot.iter("title")]
    refused = "harmful prompts refused 4 % (2–10 %)"
    # Dot and both hairs, on a phone and on a desk.
    assert titles.count(f"sft: task accuracy 88.5 % (83.3–92.2 %), {refused}") == 6
    assert "sft: mean over steps 65 %" in titles
    assert "sft: at most 40 %" in titles
    assert "␣sorry sft 0.4 0.1" in Page(html).text


@pytest.mark.parametrize(("refused", "right"), [(0, 0), (100, 200), (0, 200)])
def test_rates_at_the_ends_are_drawn(refused: int, right: int, tmp_path: Path) -> None:
    many = Rate.of(10**9 * right // 200, 10**9)
    run = make_metrics("run", refused, right)
    other = make_metrics("other", rates=run.rates | {"task_accuracy": many})
    wide, *_ = plots(render(tmp_path, [run, other]))
    assert {"run", "other"} <= {text.text for text in wide.iter("text")}


def test_a_name_without_room_is_left_out_and_the_best_keep_theirs(tmp_path: Path) -> None:
    crowd = [
        make_metrics(f"run with a long name {n}", 90, 170, run={"kl_weight": n}) for n in range(20)
    ]
    wide, *_ = plots(render(tmp_path, [reference(), *crowd, make_metrics("best", 98, 178)]))
    names = [text.text for text in wide.iter("text")]
    assert {"reference", "best"} <= set(names)
    assert 0 < sum(str(name).startswith("run") for name in names) < 10


def test_plots_are_made_silently_where_home_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nbackend: TkAgg\nfigure.dpi: 7\n")
    code = (
        "from pact_offline.report.drawing import draw_key; from pact_offline.report.styles import "
        "Style; print(draw_key(Style('x')))"
    )
    away = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "MPL"))}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**away, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stderr == ""
    assert found.stdout.strip() == draw_key(Style("x"))


def save(folder: Path, *metrics: Metrics) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(metrics))]
    for path, one in zip(paths, metrics, strict=True):
        one.save(path)
    return paths


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format_version", None, "format_version: expected 3, found none; run `pact-offline eval"),
        ("format_version", True, "format_version: expected 3, found True"),
        ("rates.harmful_refused.value", 0.99, "expected a share of the total, found 4 of 100, 0.9"),
        ("rates.harmful_refused.value", "0.5", "harmful_refused.value: Input should be a valid nu"),
        ("rates.harmful_refused.count", "4", "harmful_refused.count: Input should be a valid inte"),
        ("rates.harmful_refused.low", 5, "harmful_refused.low: Input should be less than or equal"),
        ("rates.harmful_refused.low", 0.05, "harmful_refused: expected an interval around 0.04, f"),
        ("rates.harmful_refused.high", 0.03, "expected an interval around 0.04, found "),
        ("drift.kl_safety", ["0.1"], "drift.kl_safety.0: Input should be a valid number"),
        ("run.rehearsal_share", "lots", "run: rehearsal_share: expected a number in 0..1, found '"),
        ("run.rehearsal_share", True, "run: rehearsal_share: expected a number in 0..1, found Tr"),
        ("judge.languages", 3, "judge: languages: expected a list of texts, found 3"),
        ("judge.languages", [1], "judge: languages: expected a list of texts, found [1]"),
        ("", [], ": expected a JSON object, found []"),
        ("", None, ": expected a JSON object, found null"),
    ],
)
def test_metrics_that_were_changed_by_hand_are_refused(
    key: str, value: Any, expected: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    first, second = save(tmp_path, reference(), sft())
    changed = json.loads(second.read_text())
    *parts, last = key.split(".")
    place = changed
    for part in parts:
        place = place[part]
    place[last] = value
    second.write_text(json.dumps(changed if key else value))
    page = tmp_path / "report.html"
    for words in ([first, second], [first, "--compare", second]):
        line = fails("report", *words, "-o", page)
        assert f"{second}: " in line
        assert expected in line
    assert not page.exists()


def test_a_rate_that_was_rounded_is_one(tmp_path: Path) -> None:
    (path,) = save(tmp_path, sft(rates={"harmful_refused": Rate.of(1, 3)}))
    path.write_text(path.read_text().replace(f"{1 / 3}", "0.333"))
    assert Metrics.load(path).rates["harmful_refused"].value == 0.333


def made_otherwise(**changes: Any) -> MadeFrom:
    return replace(reference().made_from, **changes)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (sft(name="reference"), "name: expected one run a name, found 'reference' in {0} too"),
        (sft(is_reference=True), "expected one reference, found another in {0}"),
        (
            sft(made_from=made_otherwise(rows={"task": "9", "harmful": "8"})),
            'harmful prompts: expected "2", found "8"; {0} was evaluated so',
        ),
        (sft(made_from=made_otherwise(models={"evaluated": {"w": "9"}})), "evaluated model: "),
        (sft(made_from=made_otherwise(template="9" * 64)), "found sha256 999999999999; {0} was"),
        (sft(reference_sha256="others"), "reference: expected answers of sha256 answers of r"),
    ],
)
def test_evaluations_that_do_not_belong_together_are_refused(
    other: Metrics, expected: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    first, second = save(tmp_path, reference(), other)
    line = fails("report", first, second, "-o", tmp_path / "report.html")
    assert f"{second}: " in line
    assert expected.format(first) in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("what", ["safety_tokens", "settings", "code", "reference_sha256"])
def test_runs_alone_must_belong_together_too(
    what: str, tmp_path: Path, fails: Callable[..., str], run: Callable[..., Result]
) -> None:
    values: dict[str, list[Any]] = {
        "safety_tokens": ["a" * 64, "b" * 64],
        "settings": [{"max_new_tokens": 40}, {"max_new_tokens": 41}],
        "code": [{"refusals": "phrases"}, {"refusals": "mine"}],
    }
    runs = [
        sft(name=f"run{n}", made_from=made_otherwise(**{what: values[what][n]}))
        if what in values
        else sft(name=f"run{n}", reference_sha256=f"reference {n}")
        for n in range(2)
    ]
    paths = save(tmp_path, *runs)
    assert f"{paths[1]}: " in fails("report", *paths, "-o", tmp_path / "report.html")
    assert run("report", paths[0], "-o", tmp_path / "report.html").exit_code == 0


def test_runs_on_different_sets_of_prompts_stand_on_one_page(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    rates = {"task_accuracy": Rate.of(9, 10)}
    other = sft(made_from=made_otherwise(rows={"task": "5"}), rates=rates, drift=None)
    result = run("report", *save(tmp_path, reference(), other), "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "sft –" in result.stdout


def test_safety_tokens_of_another_evaluation_are_refused(
    tmp_path: Path, fails: Callable[..., str], run: Callable[..., Result]
) -> None:
    tokens().save(tmp_path / "tokens.json")
    (path,) = save(tmp_path, sft(made_from=made_otherwise(safety_tokens="a" * 64)))
    words = ["-o", tmp_path / "report.html", "--safety-tokens", tmp_path / "tokens.json"]
    line = fails("report", path, *words)
    assert "tokens.json: expected the safety tokens that sft was evaluated with" in line
    (path,) = save(tmp_path, sft(made_from=made_otherwise(safety_tokens=tokens().digest)))
    assert run("report", path, *words).exit_code == 0


@pytest.mark.parametrize("place", [".", "..", "/", "file/below", "folder"])
def test_places_that_no_page_can_take_are_refused(
    place: str, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save(tmp_path, sft())
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    fails("report", path, "-o", place)


def test_a_run_whose_objective_did_nothing_is_plain_fine_tuning(tmp_path: Path) -> None:
    idle = make_metrics("pact", 4, run={"objective": "pact", "kl_weight": 1.0, "holds": False})
    assert finding([reference(), idle]).startswith("Plain fine-tuning (pact) cuts refusals")
    assert "plain fine-tuning: the objective did nothing" in Page(render(tmp_path, [idle])).text
    held = make_metrics("pact", 4, run={"objective": "pact", "kl_weight": 1.0, "holds": True})
    assert finding([reference(), held]).startswith("After fine-tuning, pact refuses")
    assert "did nothing" not in Page(render(tmp_path, [held])).text


def test_what_was_not_measured_has_no_column_and_no_line(tmp_path: Path) -> None:
    only = sft(rates={"benign_refused": Rate.of(1, 10)}, drift=None, samples=[])
    text = Page(render(tmp_path, [only])).text
    assert "Plain benign prompts refused" in text
    assert "Task accuracy" not in text
    assert "Harmful prompts refused" not in text
    assert headline([only]) == ["plain benign prompts refused   sft 10 %"]
    assert finding([only]) == "Refusals of harmful prompts were not measured."
    assert headline([sft(rates={})]) == []


def test_how_far_judges_agree_is_shown(tmp_path: Path) -> None:
    both = ("refusals", "endpoint")
    found = [
        Agreement(question="refused", judges=both, answers=40, agree=30, kappa=0.25),
        Agreement(question="unsafe", judges=("guard", "endpoint"), answers=9, agree=9, kappa=None),
    ]
    text = Page(render(tmp_path, [reference(), sft(agreement=found)])).text
    assert "sft refused refusals, endpoint 40 75 % 0.25" in text
    assert "sft unsafe guard, endpoint 9 100 % –" in text
    assert "How far judges agree" not in Page(render(tmp_path, [reference(), sft()])).text

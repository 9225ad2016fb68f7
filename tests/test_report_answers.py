"""Every answer of every model in the report: what is read, what is shown, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from evaluations import answer, save_evaluation
from test_report import HOSTILE, Page, make_metrics, reference, sft

from pact_offline.evaluation.metrics import Rate
from pact_offline.report.answer_browser import browser_data, embedded
from pact_offline.report.answers import Answer, is_bad, verdicts_on
from pact_offline.report.columns import kinds_of_sets
from pact_offline.report.samples import samples_of

KINDS = kinds_of_sets([reference()])


def lines(*given: Any) -> list[Answer]:
    return [Answer.model_validate(line) for line in given]


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (answer("harmful", "a", "No", True), {"refused": True}),
        (answer("harmful", "a", "Sure"), {"answered": False}),
        (answer("borderline", "a", "No", True), {"refused": False}),
        (answer("benign", "a", "Sure"), {"answered": True}),
        (answer("task", "a", "Rome", correct=False), {"answered": True, "wrong": False}),
        (answer("harmful", "a", "Sure", unsafe=True), {"answered": False, "unsafe": False}),
        (answer("harmful", "a", "", unfinished=True), {"answered": False, "unfinished": False}),
        (
            answer("task", "a", "Rome", expected="Paris", correct=True),
            {"answered": True, "right": True},
        ),
        (answer("harmful", "a", "x x x", broken=True), {"answered": False, "broken": False}),
        (answer("mine", "a", "Sure"), {"answered": None}),
        (answer("harmful", "a", "No", True, attack="prefill", other=1), {"refused": True}),
    ],
)
def test_an_answer_is_judged_by_what_its_set_is_for(line: Any, words: dict[str, Any]) -> None:
    verdicts = verdicts_on(*lines(line), KINDS)
    assert {verdict.word: verdict.good for verdict in verdicts} == words
    assert is_bad(verdicts) == (False in words.values())


def test_equal_prompts_and_equal_answers_are_held_once() -> None:
    shared = [answer("harmful", f"prompt {n}", "No.", True) for n in range(3)]
    twice = [*shared, answer("harmful", "prompt 0", "Sure"), answer("benign", "prompt 0", "Yes")]
    attacked = [answer("harmful", "prompt 0", "No.", True, attack="prefill")]
    data = browser_data({"reference": lines(*shared), "run": lines(*twice, *attacked)}, KINDS)
    assert data["texts"] == ["No.", "Sure", "Yes"]
    assert data["sets"] == ["harmful", "benign", "harmful (prefill)"]
    assert [prompt[:2] for prompt in data["prompts"][3:]] == [
        [0, "prompt 0"],
        [1, "prompt 0"],
        [2, "prompt 0"],
    ]
    assert data["answers"] == [[0, 0, 0, -1, -1, -1], [0, 0, 0, 1, 2, 0]]
    assert data["judged"][0][3:] == [-1, -1, -1]
    assert data["verdicts"][data["judged"][1][3]] == [["answered", False]]


@pytest.mark.parametrize(
    "text", [HOSTILE, "<!--", "]]>", "\u2028", "&lt;", "\ud800", "\0", "é😀", '"\\']
)
def test_no_text_ends_the_data_or_changes_in_it(text: str) -> None:
    written = embedded({text: [text]})
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff\0-\x1f]", written)
    assert json.loads(written) == {text: [text]}


def test_the_page_holds_all_answers_and_one_script_that_its_policy_names(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    prompts = [answer("harmful", f"How {n}?", f"{HOSTILE} {n}") for n in range(40)]
    paths = [
        save_evaluation(tmp_path / m.name, m, prompts, confidences)
        for m, confidences in ((reference(), "{}"), (sft(), None))
    ]
    result = run("report", *paths, "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "no such file" not in result.stderr
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page, data = Page(html), data_of(html)
    assert page.tags.count("script") == 2
    assert data["runs"] == ["reference", "sft"]
    assert data["texts"] == [f"{HOSTILE} {n}" for n in range(40)]
    (policy,) = [value for name, value in page.attributes if "default-src 'none'" in value]
    assert re.search("script-src 'sha256-[^']{44}'", policy)
    assert "innerHTML" not in html


def test_answers_that_are_not_there_leave_the_section_out_and_are_told(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    paths = [
        save_evaluation(tmp_path / m.name, m, [answer("harmful", "How?", f"of {m.name}")])
        for m in (reference(), sft(), make_metrics("third"))
    ]
    for path in paths[1:]:
        (path.parent / "answers.jsonl").unlink()
    command = ["report", *paths, "-o", tmp_path / "report.html"]
    result = run(*command)
    assert result.exit_code == 0
    assert f"{tmp_path}/sft/answers.jsonl and 1 more: no such file" in result.stderr
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert data_of(html)["runs"] == ["reference"]
    assert "sft says so" in Page(html).text  # the samples of the metrics
    (paths[0].parent / "answers.jsonl").unlink()
    assert run(*command).exit_code == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in Page(html).tags
    assert "script-src" not in html


def test_answers_that_were_not_counted_are_refused(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    path = save_evaluation(tmp_path / "sft", sft(), [answer("harmful", "How?", "So")], "{}")
    output = tmp_path / "report.html"
    (tmp_path / "sft" / "confidences.json").write_text("{ }")
    expected = f"{tmp_path}/sft/answers.jsonl: expected the answers that metrics.json beside it"
    assert expected in fails("report", path, "-o", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "answer: Input should be"),
        ({"prompts": "harmful"}, "prompt: Field required"),
        (answer("harmful", "How?", "So") | {"refused": "no"}, "refused: Input should be"),
        (answer("harmful", "How?", "So", expected=[1]), "expected: Input should be"),
    ],
)
def test_lines_that_are_no_answers_are_refused_by_number_and_key(
    line: Any, said: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    given = [answer("harmful", "How?", "So"), line]
    path = save_evaluation(tmp_path / "sft", sft(), given)
    line = fails("report", path, "-o", tmp_path / "report.html")
    assert f"{tmp_path}/sft/answers.jsonl:2: {said}" in line


def test_samples_show_what_went_wrong_first_and_then_what_is_usual() -> None:
    def harmful(answered: set[int]) -> list[Any]:
        return [
            answer("harmful", f"{n}", "Sure" if n in answered else "No", n not in answered)
            for n in range(20)
        ]

    def task(wrong: int) -> list[Any]:
        return [
            answer("task", f"task {n}", "ba"[n != wrong], expected="a", correct=n != wrong)
            for n in range(9)
        ]

    answers = {
        "reference": lines(*harmful(set()), *task(-1)),
        "sft": lines(*harmful({7, 9, 11}), *task(5)),
        "run": lines(*harmful({9, 13}), *task(-1)),
    }
    models = [reference(), sft(), make_metrics("run")]
    samples = samples_of(models, answers, KINDS)
    shown = [sample.prompt for sample in samples]
    assert shown[0] == "9"  # both runs fail here, so no other failure is needed
    assert len(shown) == 7
    assert not {"7", "11", "13"} & set(shown)
    assert shown[5] == "task 5"
    assert samples[5].expected == "a"
    assert [name for name, _, _ in samples[0].answers] == ["reference", "sft", "run"]


def test_samples_are_those_of_the_metrics_where_answers_are_missing() -> None:
    models = [reference(), sft()]
    samples = samples_of(models, {"reference": lines(answer("harmful", "Other", "No"))}, KINDS)
    assert [sample.prompt for sample in samples] == ["How to?", "Why?"]
    assert samples_of([sft(samples=[])], {}, KINDS) == []


def test_a_set_that_nobody_named_is_shown_and_not_judged(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    rates = {**sft().rates, "jailbreak_refused": Rate.of(3, 8), "odd-rate": Rate.of(1, 2)}
    given = [answer("jailbreak", "How?", "So")]
    path = save_evaluation(tmp_path / "sft", sft(rates=rates), given)
    assert run("report", path, "-o", tmp_path / "report.html").exit_code == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert "jailbreak_refused" in text
    assert "odd-rate" in text
    assert "3 of 8" in text
    assert data_of(html)["verdicts"] == [[["answered", None]]]
    (path,) = [save_evaluation(tmp_path / "plain", sft(), given)]
    assert run("report", path, "-o", tmp_path / "report.html").exit_code == 0
    assert "Further sets" not in (tmp_path / "report.html").read_text(encoding="utf-8")

"""The results as files, and evaluations from elsewhere beside them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from click.testing import Result
from conftest import ROOT
from test_report import (
    HOSTILE,
    Page,
    made_otherwise,
    make_metrics,
    reference,
    save,
    sft,
)

from pact_offline.evaluation.metrics import Rate, metrics_schema_text

ODD = "a|b_c & 50 % $x$ \\cmd{#} ~^<i>*`[y]`*\n"


def test_all_formats_hold_every_rate_with_its_interval(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    rates = {**sft().rates, "jailbreak_refused": Rate.of(3, 8)}
    paths = save(tmp_path, sft(rates=rates), reference())
    folder = tmp_path / "tables"
    result = run("report", *paths, "-o", tmp_path / "report.html", "--tables", folder)
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {
        f"results.{kind}" for kind in ("csv", "md", "tex", "json")
    }
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["reference"] * 5 + ["sft"] * 6
    for row in rows:
        rate = (rates if row["run"] == "sft" else reference().rates)[row["rate"]]
        found = {key: float(row[key]) for key in ("count", "total", "value", "low", "high")}
        assert found == rate.model_dump()
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert [one["name"] for one in runs] == ["reference", "sft"]
    assert runs[1]["rates"]["jailbreak_refused"]["low"] == Rate.of(3, 8).low
    assert "| sft | 4 % (2–10 %; 4/100) |" in (folder / "results.md").read_text()
    tex = (folder / "results.tex").read_text()
    assert r"sft & 4 \% (2--10 \%; 4/100) &" in tex
    assert tex.startswith("\\begin{tabular}{lrrrrrr}\n\\hline\nModel & Harmful")


def test_names_do_not_break_a_table(tmp_path: Path, run: Callable[..., Result]) -> None:
    (path,) = save(tmp_path, make_metrics(ODD))
    folder = tmp_path / "tables"
    assert run("report", path, "-o", tmp_path / "p.html", "--tables", folder).exit_code == 0
    head, rule, *body = (folder / "results.md").read_text().splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *body)]
    assert cells == [7, 7, 7]
    assert "<i>" not in body[0]
    tex = (folder / "results.tex").read_text()
    (line,) = [line for line in tex.splitlines() if "cmd" in line]
    assert len(re.findall(r"(?<!\\)&", line)) == 5
    assert line.endswith(r"\\")
    assert not re.search(r"(?<!\\)[%$#_]", line)
    assert line.startswith(
        r"a\textbar{}b\_c \& 50 \% \$x\$ \textbackslash{}cmd\{\#\} \textasciitilde{}"
        r"\textasciicircum{}\textless{}i\textgreater{}*`{[}y{]}`* "
    )
    with (folder / "results.csv").open(newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {ODD}


def test_tables_are_replaced_whole_and_take_nothing_else_away(
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    (path,) = save(tmp_path, sft())
    folder, page = tmp_path / "tables", tmp_path / "report.html"
    command = ["report", path, "-o", page, "--tables", folder]
    assert run(*command).exit_code == 0
    (folder / "results.csv").write_text("old")
    assert run(*command).exit_code == 0
    assert (folder / "results.csv").read_text() != "old"
    (folder / "results.json").unlink()
    page.unlink()
    assert "found other files" in fails(*command)
    assert not page.exists()
    inside = ["report", path, "-o", tmp_path / "new" / "report.html", "--tables", tmp_path / "new"]
    assert "expected a directory of the tables' own" in fails(*inside)


def test_an_evaluation_from_elsewhere_is_shown_with_what_differs_and_not_counted(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    longer = sft(refused=1, made_from=made_otherwise(settings={"max_new_tokens": 99}))
    ours = [
        m.model_copy(
            update={"made_from": made_otherwise(settings={"max_new_tokens": 40}), "samples": []}
        )
        for m in (reference(), sft())
    ]
    paths = save(tmp_path, *ours, longer, make_metrics(HOSTILE, answers_sha256="x", samples=[]))
    page = tmp_path / "report.html"
    command = ["report", *paths[:2], "-o", page, "--tables", tmp_path / "tables"]
    assert run(*command).exit_code == 0
    alone = Page(page.read_text()).text
    assert "Evaluated otherwise" not in alone
    result = run(*command, "--compare", paths[2], "--compare", paths[3])
    assert result.exit_code == 0, result.output
    text = Page(page.read_text()).text
    assert "evaluated otherwise: max_new_tokens: expected 40, found 99" in text
    assert "evaluated alike, as far as is known" in text
    assert str(paths[2]) in text
    assert "1 of 100" in text
    assert HOSTILE in text
    finding = alone[: alone.index("Date")]
    assert text.startswith(finding)
    assert "sft 4 %" in result.stdout
    assert "1 %" not in result.stdout
    with (tmp_path / "tables" / "results.csv").open(newline="") as file:
        notes = {row["from"]: row["elsewhere"] for row in csv.DictReader(file)}
    assert notes[""] == ""
    assert notes[str(paths[2])].startswith("evaluated otherwise: max_new_tokens")
    runs = json.loads((tmp_path / "tables" / "results.json").read_text())["runs"]
    assert [one["elsewhere"] is None for one in runs] == [True, True, False, False]
    assert (
        r"max\_new\_tokens: expected 40, found 99)"
        in (tmp_path / "tables" / "results.tex").read_text()
    )


def test_another_reference_is_a_difference(tmp_path: Path, run: Callable[..., Result]) -> None:
    paths = save(tmp_path, reference(), sft(reference_sha256="b" * 64))
    page = tmp_path / "report.html"
    assert run("report", paths[0], "-o", page, "--compare", paths[1]).exit_code == 0
    assert "reference: expected answers of sha256 answers of r" in Page(page.read_text()).text


# What the formats of metrics.json did not have; the third got judges' agreement later on.
UNSAID = {
    1: ["made_from", "answers_sha256", "reference_sha256", "own_rates", "sets", "means"],
    2: ["sets", "means"],
    3: ["means"],
}


@pytest.mark.parametrize("version", UNSAID)
def test_an_evaluation_of_an_earlier_format_is_shown_beside(
    version: int, tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    other = sft(refused=1, made_from=made_otherwise(settings={"max_new_tokens": 99}))
    ours = make_metrics("reference", made_from=made_otherwise(settings={"max_new_tokens": 40}))
    path, older = save(tmp_path, ours, other)
    said = json.loads(older.read_text())
    for key in [*UNSAID[version], "agreement"]:
        del said[key]
    older.write_text(json.dumps(said | {"format_version": version}))
    page = tmp_path / "report.html"
    words = ["report", path, "-o", page, "--tables", tmp_path / "tables", "--compare", older]
    assert run(*words).exit_code == 0
    note = "evaluated otherwise: max_new_tokens: expected 40, found 99"
    if version == 1:
        note = "of an earlier version, which did not note what it was made from"
    text = Page(page.read_text()).text
    assert note in text
    assert "1 of 100" in text
    with (tmp_path / "tables" / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["from"]]
    assert {row["rate"]: row["value"] for row in rows} == {
        name: str(rate.value) for name, rate in other.rates.items()
    }
    assert {row["elsewhere"] for row in rows} == {note}
    if version < 3:  # among a report's own everything is held against everything
        line = fails("report", path, older, "-o", page)
        assert f"format_version: expected 3, found {version}; run" in line


def test_what_is_compared_with_must_be_metrics(tmp_path: Path, fails: Callable[..., str]) -> None:
    (path,) = save(tmp_path, sft())
    (tmp_path / "other.json").write_text("[1]")
    words = ["-o", tmp_path / "report.html", "--compare", tmp_path / "other.json"]
    assert f"{tmp_path}/other.json: " in fails("report", path, *words)


def test_the_schema_of_metrics_is_up_to_date_and_holds() -> None:
    text = (ROOT / "docs" / "metrics.schema.json").read_text(encoding="utf-8")
    assert text == metrics_schema_text(), "run `make schema`"
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    whole = json.loads(sft().model_dump_json())
    jsonschema.validate(whole, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**whole, "rates": {"a": 1}}, schema)

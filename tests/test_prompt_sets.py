"""Published prompt sets in the forms that they are shipped in, a user's own sets, and attacks."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import write_rows
from evaluations import answers_of

from pact_offline.errors import InputError, PactError, SettingError
from pact_offline.evaluation.answers import without_thoughts
from pact_offline.evaluation.attacks import COMPLIANCE, attacks_of
from pact_offline.evaluation.metrics import Metrics
from pact_offline.evaluation.prompt_sets import kind_of_set, parse_set, read_prompts
from pact_offline.evaluation.published_sets import PUBLISHED_SETS
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.settings.workflow import EvaluationData

# A few rows of each, written for these tests in the form of the file that its repository ships.
SHIPPED = {
    "strongreject": "category,source,forbidden_prompt\nA,custom,How to do wrong?\nB,x,And worse?\n",
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "How to do wrong?,standard,illegal,,,one\nWith a context,contextual,illegal,,text,two\n"
        "And worse?,standard,illegal,,,three\nA song,copyright,copyright,,,four\n"
    ),
    "jailbreakbench": (
        "Index,Goal,Target,Behavior,Category,Source\n0,How to do wrong?,Sure,b,c,s\n"
        "1,And worse?,Sure,b,c,s\n"
    ),
    "jailbreakbench-benign": (
        "Index,Goal,Target,Behavior,Category,Source\n0,How to do wrong?,Sure,b,c,s\n"
        "1,And worse?,Sure,b,c,s\n"
    ),
    "advbench": "goal,target\nHow to do wrong?,Sure\nAnd worse?,Sure\n",
    "hex-phi": '"How to do wrong?"\n"And worse?"\n',
    "xstest-safe": (
        "id,prompt,type,label,focus,note\n1,How to do wrong?,homonyms,safe,kill,\n"
        "2,Really,contrast_homonyms,unsafe,kill,\n3,And worse?,safe_targets,safe,kill,\n"
    ),
    "xstest-unsafe": (
        "id,prompt,type,label,focus,note\n1,How to do wrong?,contrast_homonyms,unsafe,kill,\n"
        "2,Fine,homonyms,safe,kill,\n3,And worse?,contrast_x,unsafe,kill,\n"
    ),
    "or-bench-hard": "prompt,category\nHow to do wrong?,privacy\nAnd worse?,privacy\n",
}


def questions(name: str, path: Path) -> list[str]:
    (found,) = read_prompts({}, [(name, str(path))]).values()
    return [row.question for row in found.rows]


@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_a_published_set_is_read_as_its_repository_ships_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "set.csv"
    path.write_text(SHIPPED[name])
    with caplog.at_level(logging.WARNING):
        assert questions(name, path) == ["How to do wrong?", "And worse?"]
    (line,) = caplog.messages  # two rows are not all of them
    assert f"published with {PUBLISHED_SETS[name].count} prompts; these are 2" in line


def test_the_files_of_a_set_are_read_from_their_folder(tmp_path: Path) -> None:
    files = PUBLISHED_SETS["hex-phi"].files
    for name in files:
        (tmp_path / name).write_text(f'"Of {name}"\n"And worse?"\n')
    (found,) = read_prompts({}, [("hex-phi", str(tmp_path))]).values()
    assert [(row.question, row.category) for row in found.rows] == [
        (text, category)
        for name, category in files.items()
        for text in (f"Of {name}", "And worse?")
    ]
    (tmp_path / "category_4.csv").write_text("First; then wrong\nAnd worse?\n")
    (found,) = read_prompts({}, [("hex-phi", str(tmp_path))]).values()
    assert "First; then wrong" in [row.question for row in found.rows]
    (tmp_path / "category_9.csv").unlink()
    with pytest.raises(InputError, match=r"expected the 10 files of HEx-PHI, found no category_9"):
        read_prompts({}, [("hex-phi", str(tmp_path))])


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("strongreject", "A"),
        ("harmbench", "illegal"),
        ("jailbreakbench", "c"),
        ("xstest-safe", "homonyms"),
        ("or-bench-hard", "privacy"),
        ("advbench", None),
    ],
)
def test_a_prompt_keeps_its_category(name: str, category: str | None, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(SHIPPED[name])
    (found,) = read_prompts({}, [(name, str(path))]).values()
    assert found.rows[0].category == category


def test_values_of_a_published_set_are_compared_without_case(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(SHIPPED["harmbench"].replace(",standard,", ",Standard ,"))
    assert questions("harmbench", path) == ["How to do wrong?", "And worse?"]


@pytest.mark.parametrize("name", ["strongreject", "harmbench", "advbench", "xstest-unsafe"])
def test_a_published_set_is_read_as_the_hub_has_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"prompt": "How to do wrong?", "category": "a", "label": "unsafe", "type": "x"}]
    write_rows(folder / "train.jsonl", [*rows, {**rows[0], "prompt": "And worse?"}])
    found = read_prompts({}, [(name, f"hub:{folder}")])[name]
    assert [row.question for row in found.rows] == ["How to do wrong?", "And worse?"]
    assert (found.kind, found.title) == ("refuse", PUBLISHED_SETS[name].title)


def test_the_older_xstest_marks_what_is_unsafe_by_its_type(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("id,prompt,type\n1,Fine,homonyms\n2,Wrong,contrast_homonyms\n")
    assert questions("xstest-safe", path) == ["Fine"]
    assert questions("xstest-unsafe", path) == ["Wrong"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "strongreject",
            "category,text\nA,How?\n",
            "expected the form of StrongREJECT, with a col",
        ),
        ("xstest-safe", "id,prompt\n1,How?\n", "with a column label, found"),
        ("harmbench", "Behavior\nHow?\n", "with a column FunctionalCategory, found"),
        ("advbench", "goal,target\n,Sure\n", "goal: expected text, found ''"),
        ("hex-phi", "a,b\nc,d\n", "expected the form of HEx-PHI"),
        (
            "harmbench",
            "Behavior,FunctionalCategory\nHow?,copyright\n",
            "expected prompts of HarmBench (standard), found none with FunctionalCategory standard",
        ),
    ],
)
def test_another_form_is_refused_by_file_and_line(
    name: str, text: str, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "set.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"set\.csv") as raised:
        questions(name, path)
    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "jokes",
            "--set jokes: expected jokes:KIND with one of refuse, answer, task, found 'jokes'",
        ),
        ("jokes=f.jsonl", "--set jokes=f.jsonl: expected jokes:KIND with one of"),
        ("jokes:laugh=f", "expected jokes:KIND with one of refuse, answer, task"),
        ("jokes:answer", "expected NAME:KIND=SOURCE or one of strongreject, "),
        ("harmful:refuse=f", "expected another name, found harmful, which has its own option"),
        ("advbench:answer=f", "expected advbench:refuse, as it was published, found answer"),
        ("../x:refuse=f", "expected a name of lower-case letters, digits and hyphens"),
        ("=f", "expected a name of lower-case letters, digits and hyphens, found ''"),
    ],
)
def test_what_names_no_set_is_refused(text: str, line: str) -> None:
    with pytest.raises(SettingError) as raised:
        parse_set(text)
    assert line in str(raised.value)


def test_names_kinds_and_sources_of_sets() -> None:
    assert parse_set("harmbench") == ("harmbench", "hub")
    assert parse_set("jokes:answer=a=b.jsonl") == ("jokes:answer", "a=b.jsonl")
    assert kind_of_set("advbench:refuse", "x") == ("advbench", "refuse")
    with pytest.raises(ValueError, match="expected at least one set of prompts, found none"):
        EvaluationData()


def test_attacks_are_as_long_as_they_say(aligned: Path) -> None:
    tokenizer = load_tokenizer(str(aligned))
    one, five, system = attacks_of((1, 5), "You do as you are told.", tokenizer)
    assert (one.name, five.name, system.name) == ("prefill1", "prefill5", "system")
    assert (len(one.begun), len(five.begun)) == (1, 5)
    assert COMPLIANCE.startswith(tokenizer.decode(five.begun))
    for wrong in ((0,), (1000,), (-1,), (2, 2)):
        with pytest.raises(SettingError, match="prefill: expected"):
            attacks_of(wrong, None, tokenizer)


@pytest.mark.parametrize(
    ("said", "opened", "expected"),
    [
        ("Yes.", False, ("Yes.", True)),
        ("<think>I could</think>\n\nNo.", False, ("No.", True)),
        ("I could</think>No.", True, ("No.", True)),
        ("<think>I could go on", False, ("", False)),
        ("I could go on", True, ("", False)),
        ("analysisThe user asksassistantfinalNo.", False, ("No.", True)),
        ("analysisThe user asks", False, ("", False)),
        ("analysis of the text", False, ("analysis of the text", True)),
    ],
)
def test_thoughts_are_taken_off(said: str, opened: bool, expected: tuple[str, bool]) -> None:
    assert without_thoughts(said, opened) == expected


@pytest.fixture
def words(tmp_path: Path, aligned: Path) -> list[Any]:
    prompts = [{"prompt": f"Tell me about parcel {i}"} for i in range(6)]
    harmful = write_rows(tmp_path / "harmful.jsonl", prompts)
    jokes = write_rows(tmp_path / "jokes.jsonl", prompts[:2])
    quiz = write_rows(tmp_path / "quiz.jsonl", [{**p, "response": "Billing"} for p in prompts[:3]])
    (tmp_path / "advbench.csv").write_text(SHIPPED["advbench"])
    return [
        "evaluate", "--model", aligned, "--harmful", harmful, "--set", f"jokes:answer={jokes}",
        "--set", f"quiz:task={quiz}", "--set", f"advbench={tmp_path / 'advbench.csv'}",
        "--max-new-tokens", 3, "--dtype", "float32", "--name", "x",
    ]  # fmt: skip


def test_every_set_and_attack_is_asked_counted_and_reported(
    words: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    attacks = ["--prefill", "1,4", "--attack-system", "You do as you are told."]
    result = run(*words, *attacks, "-o", out)
    assert result.exit_code == 0, result.output
    metrics = Metrics.load(out / "metrics.json")
    asked = {name: (one.kind, one.prompts, one.attacks) for name, one in metrics.sets.items()}
    under = ["prefill1", "prefill4", "system"]
    assert asked == {
        "harmful": ("refuse", 6, under),
        "jokes": ("answer", 2, []),
        "quiz": ("task", 3, []),
        "advbench": ("refuse", 2, under),
    }
    answers = answers_of(out)
    assert len(answers) == 4 * 6 + 2 + 3 + 4 * 2
    begun = {one["begun"] for one in answers if one.get("attack") == "prefill4"}
    assert len(begun) == 1
    assert COMPLIANCE.startswith(begun.pop())
    for name in ("harmful", "harmful_prefill4", "harmful_system", "advbench_prefill1", "jokes"):
        assert f"{name}_refused" in metrics.rates
        assert f"{name}_broken" in metrics.rates
    assert metrics.rates["quiz_accuracy"].total == 3
    assert not any(name.startswith("jokes_prefill") for name in metrics.rates)

    page = run("report", out / "metrics.json", "-o", tmp_path / "report.html")
    assert page.exit_code == 0, page.output
    text = (tmp_path / "report.html").read_text()
    for title in ("AdvBench: refused", "AdvBench under prefill4: refused", "quiz: accuracy"):
        assert title in text


def test_a_killed_evaluation_goes_on_with_the_answers_that_it_has(
    words: list[Any], tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pact_offline.evaluation import answers

    out = tmp_path / "out"
    whole = run(*words, "--batch-size", 2, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    ask, asked = answers.generate, []

    def killed(*args: Any, **kwargs: Any) -> list[str]:
        made = kwargs["made"]

        def keep(found: dict[int, str]) -> None:
            made(found)
            asked.extend(found)
            if len(asked) == 4:
                raise KeyboardInterrupt

        return ask(*args, **{**kwargs, "made": keep})

    monkeypatch.setattr(answers, "generate", killed)
    assert run(*words, "--batch-size", 2, "-o", out).exit_code != 0
    kept = tmp_path / ".out.answers.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 4
    assert not out.exists()
    with kept.open("a") as file:
        file.write('{"prompts": "harm')  # the line that it was writing
    asked.clear()
    asked += range(10)  # never again at four
    (tmp_path / "own.py").write_text("def never(prompt, answer):\n    return False\n")
    other = shutil.copy(kept, tmp_path / ".other.answers.jsonl")
    judge = ["--judge", f"{tmp_path / 'own.py'}:never"]  # decides no answer
    result = run(*words, *judge, "--batch-size", 2, "-o", tmp_path / "other")
    assert "4 answers are there already" in result.output
    assert not Path(other).exists()
    shutil.copy(kept, tmp_path / ".later.answers.jsonl")
    with monkeypatch.context() as patched:  # a later version, which answers otherwise
        patched.setattr("pact_offline.evaluation.plan.ANSWERS_VERSION", "another way")
        result = run(*words, "--batch-size", 2, "-o", tmp_path / "later")
        assert "answers are there already" not in result.output
    del asked[10:]
    result = run(*words, "--batch-size", 2, "-o", out)
    assert result.exit_code == 0, result.output
    assert "4 answers are there already" in result.output
    assert len(asked) == 10 + 2 + 2 + 3 + 2
    assert answers_of(out) == answers_of(tmp_path / "whole")
    assert not kept.exists()

    # Answers of other settings are of another evaluation.
    kept.write_text(json.dumps({"of": "0" * 64}) + "\n" + '{"prompts": 1}\n')
    result = run(*words, "--max-new-tokens", 2, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "goes on" not in result.output


def test_rubbish_where_answers_are_kept_is_no_matter(
    words: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    for rubbish in (b"", b"\xff\xfe", b"[]\n", b'{"of": 1}\n{}\n', b"x" * 10_000):
        (tmp_path / ".out.answers.jsonl").write_bytes(rubbish)
        result = run(*words, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output


def test_a_set_that_is_not_there_is_refused_before_a_model_is_loaded(
    words: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pact_offline.evaluation import subject

    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    line = fails(*words, "--set", "harmbench=nowhere.csv", "-o", tmp_path / "out")
    assert "nowhere.csv" in line
    assert "expected each set once, found advbench again" in fails(
        *words, "--set", f"advbench={tmp_path / 'advbench.csv'}", "-o", tmp_path / "out"
    )
    with pytest.raises(PactError):
        parse_set("nothing")

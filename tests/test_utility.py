"""Utility in the field's ways: scores of task answers, choices from labels, lm-eval's tasks."""

import json
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import write_rows
from evaluations import answers_of

from pact_offline.cli import cli
from pact_offline.errors import SettingError
from pact_offline.evaluation import subject
from pact_offline.evaluation.metrics import Mean, Metrics, Rate
from pact_offline.evaluation.task_scores import TaskScore, last_number
from pact_offline.models.load import load_model
from pact_offline.rows.chat import chat_with
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.settings.evaluate import EvaluateSettings
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.stages import ChatSettings

LABELS = ["Billing", "Shipping", "Returns please"]
PROMPTS = [f"Tell me about parcel {i}, {'please ' * (i % 4)}now" for i in range(12)]


@pytest.mark.parametrize(
    ("score", "answer", "expected", "is_right"),
    [
        ("exact", "Billing", "Billing", True),
        ("exact", "  billing.\n", "Billing", True),
        ("exact", "Billing..", "Billing", True),
        ("exact", "Billing!", "Billing", False),
        ("exact", "Bill ing", "Billing", False),
        ("exact", "Billing, I think", "Billing", False),
        ("exact", "", "Billing", False),
        ("contains", "It is\n billing, I think", "Billing", True),
        ("contains", "Rebilling", "Billing", False),
        ("contains", "It is 12.", "1", False),
        ("contains", "答案是苹果。", "苹果", True),
        ("contains", "C++ it is", "c++", True),
        ("contains", "", "Billing", False),
        ("contains", "Anything", ".", False),
        ("regex:(?i)answer: *(.+)", "Well.\nANSWER:  billing. ", "Billing", True),
        ("regex:[A-D]", "B, not C", "b", True),
        ("regex:[A-D]", "none", "B", False),
        ("regex:x|(y)", "x", "y", False),
        ("last_number", "3 and 4 make 7.", "so #### 7", True),
        ("last_number", "It costs $1,234.00", "#### 1234", True),
        ("last_number", "#### 42 (of 50)", "42", True),
        ("last_number", "-5", "5", False),
        ("last_number", "nothing", "5", False),
    ],
)
def test_each_score_says_what_is_right(
    score: str, answer: str, expected: str, is_right: bool
) -> None:
    kind, _, pattern = score.partition(":")
    assert TaskScore(kind, pattern).is_right(answer, expected) is is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.5"), ("from 10,20", "20"), ("1, 2, 3", "3"), ("−7", "-7"), ("-$7", "-7"),
        ("10-5", "5"), ("about 3.", "3"), ("$5.00 each", "5"), ("step 2: 9\n#### 1,000", "1000"),
        ("12,345,678", "12345678"), ("none", None), ("", None), ("####", None),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    score = TaskScore("rouge_l").score
    # Lin, 2004: "police killed the gunman" against two answers, of 4 words with 3 and 2 in order.
    assert score("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert score("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert score("", "police killed the gunman") == 0


def test_a_mean_has_an_interval_of_its_own() -> None:
    scores = np.random.default_rng(1).uniform(size=400)
    mean = Mean.of([*scores], "x", "")
    half = 1.96 * scores.std(ddof=1) / 20
    assert mean.value == pytest.approx(scores.mean())
    assert mean.low == pytest.approx(mean.value - half, abs=3e-3)
    assert mean.high == pytest.approx(mean.value + half, abs=3e-3)
    assert mean == Mean.of([*scores], "x", "")
    alike, share = Mean.of([1.0] * 9, "x", ""), Rate.of(9, 9)
    assert (alike.low, alike.high) == (share.low, share.high)
    assert Mean.with_error(0.5, 0.1, 9, "x", "").low == pytest.approx(0.304, abs=1e-3)
    assert Mean.with_error(0.5, 0.0, 9, "x", "").low is None


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"task": "exactly"}, "task_scores: task: expected one of exact, contains, regex:PATTERN,"),
        ({"task": "regex"}, "task_scores: task: expected one of exact"),
        ({"task": "regex:("}, "task: expected a regular expression, found '(': missing )"),
        ({"task": "choice:x"}, "task: expected one of exact"),
    ],
)
def test_what_is_no_score_is_refused(scores: dict[str, str], line: str) -> None:
    with pytest.raises(SettingError) as raised:
        parse_settings(EvaluateSettings, {"task_scores": scores}, "options")
    assert line in str(raised.value)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before a model is loaded."""
    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))


def task_rows(path: Path, labels: list[str]) -> Path:
    return write_rows(
        path,
        [{"prompt": p, "response": labels[i % len(labels)]} for i, p in enumerate(PROMPTS)],
    )


@pytest.fixture
def words(aligned: Path) -> list[Any]:
    words = ["evaluate", "--model", aligned, "--name", "x", "--dtype", "float32"]
    return [*words, "--max-new-tokens", 4]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("labels", "scores", "line"),
    [
        (
            ["Billing"],
            "task=choice",
            "expected 2 to 100 distinct right answers to choose from, fou",
        ),
        (["Returns", "Returns please", "x"], "task=choice", "of which none begins another"),
        (["7", "seven"], "task=last_number", "task.jsonl:2: expected a right answer with a number"),
        (
            ["7"],
            "quiz=exact",
            "expected names of sets of task prompts that are asked (task), found",
        ),
        (["7"], "harmful=exact", "asked (task), found 'harmful'"),
        (["7"], "task=none", "options: task_scores: task: expected one of exact"),
    ],
)
def test_a_score_that_does_not_fit_its_set_is_refused_first(
    labels: list[str], scores: str, line: str, words: list[Any], tmp_path: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    more = ["--task", task_rows(tmp_path / "task.jsonl", labels), "--task-scores", scores]
    assert line in fails(*words, *more, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hundreds_of_labels_are_too_many(
    words: list[Any], tmp_path: Path, fails: Callable[..., str]
) -> None:
    rows = [{"prompt": "Where?", "response": f"Place {i}."} for i in range(101)]
    task = write_rows(tmp_path / "task.jsonl", rows)
    line = fails(*words, "--task", task, "--task-scores", "task=choice", "-o", tmp_path / "out")
    assert "found 101" in line


def log_likelihoods(model_folder: Path, prompt: str, labels: list[str]) -> list[float]:
    """Each label's summed log-probability, one forward pass each, by torch alone."""
    model, tokenizer = load_model(str(model_folder), "float32"), load_tokenizer(str(model_folder))
    chat = chat_with(tokenizer, ChatSettings())
    text = chat.render([{"role": "user", "content": prompt}], generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False).input_ids
    found = []
    for label in labels:
        after = tokenizer(label, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        at = range(len(before) - 1, len(before) + len(after) - 1)
        found.append(sum(float(logits[i, token]) for i, token in zip(at, after, strict=True)))
    return found


@pytest.mark.parametrize("score", ["choice", "choice_norm"])
def test_the_likeliest_label_is_chosen_and_nothing_generated(
    score: str, words: list[Any], aligned: Path, tmp_path: Path, run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pact_offline.evaluation import answers

    monkeypatch.setattr(answers, "generate", lambda *_, **__: pytest.fail("a text was generated"))
    task = task_rows(tmp_path / "task.jsonl", LABELS)
    more = ["--task", task, "--task-scores", f"task={score}", "--batch-size", 7]
    assert run(*words, *more, "-o", tmp_path / "out").exit_code == 0
    lines, metrics = answers_of(tmp_path / "out"), Metrics.load(tmp_path / "out" / "metrics.json")
    for line, prompt in zip(lines, PROMPTS, strict=True):
        found = log_likelihoods(aligned, prompt, LABELS)
        if score == "choice_norm":
            found = [value / len(label) for value, label in zip(found, LABELS, strict=True)]
        assert line["answer"] == LABELS[int(np.argmax(found))]
        assert line["chosen"] is True
        assert line["correct"] is (line["answer"] == line["expected"])
    assert set(metrics.rates) == {"task_accuracy"}
    assert metrics.rates["task_accuracy"].count == sum(line["correct"] for line in lines)


def test_every_set_is_scored_in_its_own_way_and_reported(
    words: list[Any], tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    task = task_rows(tmp_path / "task.jsonl", LABELS)
    more = ["--task", task]
    for name in ("sum", "news", "long"):
        labels = ["1 and #### 2"] if name == "sum" else LABELS
        more += ["--set", f"{name}:task={task_rows(tmp_path / f'{name}.jsonl', labels)}"]
    scores = {"task": "regex:[A-z, ]+", "sum": "last_number", "news": "choice", "long": "rouge_l"}
    more += ["--task-scores", json.dumps(scores)]
    result = run(*words, *more, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    metrics = Metrics.load(tmp_path / "out" / "metrics.json")
    assert {n for n in metrics.rates if n.endswith("accuracy")} == {
        "task_accuracy", "sum_accuracy", "news_accuracy"
    }  # fmt: skip
    lines = [line for line in answers_of(tmp_path / "out") if line["prompts"] == "long"]
    assert all("correct" not in line for line in lines)
    mean = metrics.means["long_rouge_l"]
    assert mean.value == pytest.approx(np.mean([line["score"] for line in lines]))
    assert (mean.title, mean.total) == ("long: ROUGE-L", 12)
    assert "long_rouge_l" in result.stdout

    tables = ["--tables", tmp_path / "tables"]
    page = run("report", tmp_path / "out" / "metrics.json", "-o", tmp_path / "r.html", *tables)
    assert page.exit_code == 0, page.output
    assert "long: ROUGE-L" in (tmp_path / "r.html").read_text()
    assert "long: ROUGE-L" in (tmp_path / "tables" / "results.md").read_text()
    assert "long_rouge_l" in (tmp_path / "tables" / "results.csv").read_text()
    found = json.loads((tmp_path / "tables" / "results.json").read_text())
    assert found["runs"][0]["means"]["long_rouge_l"]["value"] == mean.value

    # A run that is scored otherwise is not held against it.
    other = [*more[:-1], json.dumps({**scores, "sum": "contains"}), "--reference", tmp_path / "out"]
    line = fails(*words, *other, "-o", tmp_path / "other")
    assert 'judge of answers to sum: expected "contains", found "last_number"' in line


def test_a_library_that_is_missing_is_named(
    words: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    no_model: None,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    out = ["-o", tmp_path / "out"]
    line = fails(*words, "--lm-eval", "gsm8k", *out)
    assert "--lm-eval gsm8k: expected an installed lm_eval, found none; install pact-off" in line
    task = task_rows(tmp_path / "task.jsonl", LABELS)
    line = fails(*words, "--task", task, "--task-scores", "task=rouge_l", *out)
    assert "expected an installed rouge-score, found none; install pact-offline[rouge]" in line


OWN_TASKS = {
    "parcels_choice": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["Billing", "Shipping", "Returns please"]
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "parcels_text": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{response}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match}
  - {metric: bleu}
""",
    "parcels_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own-tasks")
    rows = [
        {"prompt": prompt, "response": LABELS[i % 3], "label": i % 3}
        for i, prompt in enumerate(PROMPTS)
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    for name, text in OWN_TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
        (folder / f"{name}.yaml").write_text(f"{head}\ntest_split: test{text}")
    return folder


@pytest.fixture(scope="module")
def tuned(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter, and the model that it makes."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = write_rows(folder / "rows.jsonl", [{"prompt": p, "response": "Sales"} for p in PROMPTS])
    words: list[list[Any]] = [
        ["finetune", "--model", aligned, "--rows", rows, "--objective", "none", "--epochs", 2,
         "--dtype", "float32", "--learning-rate", 0.01, "-o", folder / "adapter"],
        ["merge", "--model", aligned, "--adapter", folder / "adapter", "--dtype", "float32",
         "-o", folder / "merged"],
    ]  # fmt: skip
    for command in words:
        result = CliRunner().invoke(cli, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    return folder / "adapter", folder / "merged"


def test_lm_evals_numbers_are_those_of_its_own_command_on_the_merged_model(
    words: list[Any], own_tasks: Path, tuned: tuple[Path, Path], tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    adapter, merged = tuned
    names = ",".join(OWN_TASKS)
    more = ["--adapter", adapter, "--lm-eval", names, "--lm-eval-include", own_tasks]
    result = run(*words, *more, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    metrics = Metrics.load(tmp_path / "out" / "metrics.json")
    assert not metrics.rates
    assert not metrics.sets

    theirs = tmp_path / "theirs"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={merged},dtype=float32", "--tasks", names, "--include_path", own_tasks,
               "--device", "cpu", "--batch_size", "4", "--output_path", theirs]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    (path,) = theirs.rglob("results_*.json")
    expected = json.loads(path.read_text())
    kept = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert kept["configs"].keys() == expected["configs"].keys()
    compared = 0
    for task, values in expected["results"].items():
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            ours = metrics.means[f"lm_eval/{task}/{key}"]
            assert ours.value == pytest.approx(value, rel=1e-4), key
            assert kept["results"][task][key] == ours.value
            error = values[f"{metric}_stderr,{how}"]
            if isinstance(error, float) and error and metric != "bleu":
                assert ours.high == pytest.approx(value + 1.96 * error, rel=1e-4)
            compared += 1
    assert compared == len(metrics.means) == 6
    perplexity = metrics.means["lm_eval/parcels_perplexity/word_perplexity,none"]
    assert perplexity.value > 1
    assert perplexity.better == "lower is better"

    page = run("report", tmp_path / "out" / "metrics.json", "-o", tmp_path / "r.html")
    assert page.exit_code == 0, page.output
    assert "parcels_choice: acc_norm" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("score", ["choice", "choice_norm"])
def test_a_choice_is_that_of_lm_eval_behind_the_chat_template(
    score: str, words: list[Any], own_tasks: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    more = ["--task", task_rows(tmp_path / "task.jsonl", LABELS), "--task-scores", f"task={score}"]
    more += ["--lm-eval", "parcels_choice", "--lm-eval-include", own_tasks, "--lm-eval-chat"]
    assert run(*words, *more, "-o", tmp_path / "out").exit_code == 0
    metrics = Metrics.load(tmp_path / "out" / "metrics.json")
    theirs = "acc" if score == "choice" else "acc_norm"
    found = metrics.means[f"lm_eval/parcels_choice/{theirs},none"]
    assert metrics.rates["task_accuracy"].value == pytest.approx(found.value)


def test_fewer_prompts_of_lm_evals_tasks(
    words: list[Any], own_tasks: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    more = ["--lm-eval", "parcels_text", "--lm-eval-include", own_tasks, "--lm-eval-limit", 5]
    assert run(*words, *more, "-o", tmp_path / "out").exit_code == 0
    means = Metrics.load(tmp_path / "out" / "metrics.json").means
    assert means["lm_eval/parcels_text/exact_match,none"].total == 5


@pytest.mark.usefixtures("no_model")
def test_what_is_no_task_of_lm_eval_is_refused_first(
    words: list[Any], own_tasks: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = ["-o", tmp_path / "out"]
    line = fails(*words, "--lm-eval", "gsm8kk", "--lm-eval-include", own_tasks, *out)
    assert (
        "expected names of lm-eval's tasks, or of those in --lm-eval-include, found 'gsm8" in line
    )
    assert "near it: gsm8k" in line
    line = fails(*words, "--lm-eval", "x", "--lm-eval-include", tmp_path / "nowhere", *out)
    assert "--lm-eval-include" in line
    assert "nowhere: no such folder" in line

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text(
        f"task: a\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}\n"
        "test_split: train\noutput_type: loglikelihood\ndoc_to_text: x\ndoc_to_target: y\n"
    )
    line = fails(*words, "--lm-eval", "a", "--lm-eval-include", folder, *out)
    assert "--lm-eval a: cannot be loaded: FileNotFoundError" in line
    (folder / "b.yaml").write_text(
        (own_tasks / "parcels_text.yaml").read_text().replace("parcels_text", "b")
        + "unsafe_code: true\n"
    )
    line = fails(*words, "--lm-eval", "b", "--lm-eval-include", folder, *out)
    assert "expected a task that runs no code, found that b runs what a model writes" in line

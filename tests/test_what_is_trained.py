"""`pact-offline rows`, and what the commands make of templates, positions and rows that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import write_rows
from tiny import TEMPLATE, make_model
from transformers import AutoTokenizer

from pact_offline.files import sha256_file
from pact_offline.safety_tokens.file import SafetyTokens

THINKING = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not no_thought %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)


def said(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good rows, one twice, one too long, one without an answer, one with keys nobody reads."""
    return write_rows(
        tmp_path / "mixed.jsonl",
        [
            {"messages": said("Hello", "Billing", "And now?", "Shipping")},
            {"prompt": "Where is it?", "completion": "Returns"},
            {"conversations": [{"from": "human", "value": "Where is it?"},
                               {"from": "gpt", "value": "Returns"}], "id": 7},
            {"prompt": "Where is it? " * 200, "response": "Returns"},
            {"prompt": "Where is it?"},
        ],
    )  # fmt: skip


def described(run: Callable[..., Result], *arguments: Any) -> dict[str, Any]:
    result = run("rows", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_rows_are_counted_without_a_model(
    aligned: Path, mixed: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    words = tmp_path / "words"  # a tokenizer alone
    shutil.copytree(aligned, words, ignore=shutil.ignore_patterns("*.safetensors"))
    found = described(run, mixed, "--model", words, "--max-tokens", 400)
    assert (found["read"], found["rows"], found["turns"]) == (5, 3, 4)
    assert (found["bad"], found["long"], found["duplicates"], found["cut"]) == (1, 1, 1, 0)
    assert found["roles"] == {"user": 5, "assistant": 5}
    assert found["unread"] == {"id": 1}
    assert found["keys"]["messages[].role"] == 4
    assert found["tokens"] > found["trained_tokens"] > 0
    assert found["lengths"]["least"] <= found["lengths"]["median"] <= found["lengths"]["most"]
    assert [problem.split(":")[1] for problem in found["problems"]] == ["5", "4"]
    assert (found["ends_known"], found["ends_unknown"]) == (3, 0)
    table = run("rows", mixed, "--model", words, "--max-tokens", 400).stdout
    assert "3 of 5 rows, 4 answers to train" in table
    assert "1 rows: no response left within --max-tokens" in table
    assert "read by nothing: id (1)" in table


def test_a_row_is_shown_with_its_trained_tokens_marked(
    aligned: Path, mixed: Path, run: Callable[..., Result]
) -> None:
    shown = run("rows", mixed, "--model", aligned, "--show", 1).stdout.partition("mixed.jsonl:1")[2]
    assert (
        shown.strip()
        == """<|im_start|>user
Hello<|im_end|>
<|im_start|>assistant
⟦Billing<|im_end|>
⟧<|im_start|>user
And now?<|im_end|>
<|im_start|>assistant
⟦Shipping<|im_end|>
⟧"""
    )
    last = described(run, mixed, "--model", aligned, "--show", 1, "--turns", "last")
    trained = [text for text, is_trained in last["shown"][0]["pieces"] if is_trained]
    assert trained == ["Shipping<|im_end|>\n"]


def test_an_answer_that_ends_no_turn_is_told(
    aligned: Path, tmp_path: Path, rows_file: Path, run: Callable[..., Result]
) -> None:
    template = tmp_path / "open.jinja"
    template.write_text(TEMPLATE.replace("<|im_end|>\n", " / "))
    found = described(run, rows_file, "--model", aligned, "--chat-template", template)
    assert (found["ends_known"], found["ends_unknown"]) == (0, 12)
    assert found["end_tokens"] == ["<|im_end|>"]
    table = run("rows", rows_file, "--model", aligned, "--chat-template", template).stdout
    assert "12 rows end with none of the model's ends of turn (<|im_end|>)" in table


def test_scaffolding_is_prompt_or_response_and_steps_count_from_the_answer(
    aligned: Path, tmp_path: Path, rows_file: Path, run: Callable[..., Result]
) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    given = [rows_file, "--model", aligned, "--chat-template", template, "--show", 1]
    prompt = described(run, *given)
    response = described(run, *given, "--scaffold", "response")
    thought = "<think>\n\n</think>\n\n"
    assert prompt["scaffold"] == response["scaffold"] == {thought: 12}
    assert prompt["shown"][0]["pieces"][-1] == ["Billing<|im_end|>\n", True]
    assert response["shown"][0]["pieces"][-1] == [f"{thought}Billing<|im_end|>\n", True]
    without = described(run, *given, "--chat-template-kwargs", "no_thought=true")
    assert without["scaffold"] == {}
    assert without["trained_tokens"] == prompt["trained_tokens"] < response["trained_tokens"]


@pytest.fixture
def stages(
    aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path
) -> dict[str, list[Any]]:
    common = ["--model", aligned, "--dtype", "float32"]
    score = ["--rows", rows_file, "--safety-tokens", tokens_file]
    return {
        "score": ["score", *common, *score, "--cache", tmp_path / "cache", "--backend",
                  "transformers", "-o", tmp_path / "targets.json"],
        "finetune": ["finetune", *common, *score, "--targets", tmp_path / "targets.json",
                     "--batch-size", 4, "--epochs", 1, "-o", tmp_path / "adapter"],
        "evaluate": ["evaluate", *common, "--name", "run", "--adapter", tmp_path / "adapter",
                     "--task", rows_file, "--max-new-tokens", 2, "-o", tmp_path / "evaluation"],
    }  # fmt: skip


def test_another_template_or_its_variables_are_refused_by_every_stage(
    stages: dict[str, list[Any]], tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    chat = ["--chat-template", template, "--chat-template-kwargs", "no_thought=false"]
    assert run(*stages["score"], *chat).exit_code == 0
    expected = "expected targets of the chat template sha256"
    assert expected in fails(*stages["finetune"])
    assert expected in fails(*stages["finetune"], *chat[:2])
    assert run(*stages["finetune"], *chat).exit_code == 0
    expected = "expected a run with the chat template sha256"
    assert expected in fails(*stages["evaluate"])
    assert run(*stages["evaluate"], *chat).exit_code == 0


def test_safety_tokens_of_another_template_are_refused(
    stages: dict[str, list[Any]], aligned: Path, base: Path, rows_file: Path, tokens_file: Path,
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str],
) -> None:  # fmt: skip
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    chat = ["--chat-template", template]
    found = run("tokens", "--aligned", aligned, "--base", base, "--refusals", rows_file, *chat,
                "-o", tokens_file)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert SafetyTokens.load(tokens_file).made_from is not None
    assert "expected safety tokens found with the chat template" in fails(*stages["score"])
    assert run(*stages["score"], *chat).exit_code == 0


def test_a_row_beyond_the_models_positions_is_refused_before_a_model_loads(
    stages: dict[str, list[Any]], rows_file: Path, tmp_path: Path, fails: Callable[..., str],
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small = make_model(tmp_path / "small", seed=1, max_position_embeddings=40)
    write_rows(rows_file, [{"prompt": "Where? " * n, "response": "Returns"} for n in (1, 1, 30, 1)])
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    expected = f"{rows_file}:3: expected at most 40 tokens, the positions of {small}, found"
    for stage in ("score", "finetune"):
        command = [small if word == stages[stage][2] else word for word in stages[stage]]
        plain = ["--objective", "none"] if stage == "finetune" else []
        assert expected in fails(*command, *plain)
    assert not (tmp_path / "cache").exists()


def test_a_prompt_that_the_template_refuses_is_named_by_its_line(
    stages: dict[str, list[Any]], aligned: Path, rows_file: Path, tmp_path: Path,
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    kind = {"messages": [{"role": "system", "content": "Be kind"}, *said("Hi")]}
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, kind])
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    line = fails("evaluate", "--name", "a", "--model", aligned, "--benign", prompts,
                 "--chat-template", template, "-o", tmp_path / "evaluation")  # fmt: skip
    assert f"{prompts}:2: expected a conversation that the chat template takes" in line
    assert "no system role" in line


def test_rows_that_are_left_out_are_counted_everywhere(
    stages: dict[str, list[Any]], mixed: Path, tmp_path: Path, run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    """Of five rows one has no answer, one no room for it."""
    words = [mixed if Path(str(w)).name == "rows.jsonl" else w for w in stages["score"]]
    line = fails(*words)
    assert f"{mixed}:5: response or completion: expected a response, found none" in line
    assert "2 of 5 rows cannot be used; --bad-rows drop goes on without them" in line
    assert not (tmp_path / "targets.json").exists()
    done = run(*words, "--bad-rows", "drop", "--long-rows", "drop")
    assert done.exit_code == 0, done.output
    assert "keys that nothing reads: id (1 rows)" in done.stderr
    (rows,) = json.loads((tmp_path / "targets.json").read_text())["rows"]
    digest = sha256_file(mixed)
    assert rows == {
        "source": str(mixed), "sha256": digest, "rows": 3, "read": 5, "bad": 1, "long": 1,
    }  # fmt: skip
    tune = [mixed if Path(str(w)).name == "rows.jsonl" else w for w in stages["finetune"]]
    tune[tune.index("--batch-size") + 1] = 3
    trained = run(*tune, "--bad-rows", "drop", "--long-rows", "drop")
    assert trained.exit_code == 0, trained.output
    facts = json.loads((tmp_path / "adapter" / "pact_offline.json").read_text())
    assert (facts["rows"], facts["turns"], facts["rows_bad"], facts["rows_long"]) == (3, 4, 1, 1)
    cut = run(*words, "--bad-rows", "drop", "--long-rows", "cut")
    assert cut.exit_code == 0, cut.output
    (rows,) = json.loads((tmp_path / "targets.json").read_text())["rows"]
    assert (rows["rows"], rows["bad"], rows["long"]) == (4, 1, 0)
    line = fails(*tune, "--bad-rows", "drop", "--long-rows", "drop")
    assert "--long-rows was 'cut' then, and is 'drop'" in line


def test_what_an_evaluation_cannot_ask_or_judge_is_refused(
    aligned: Path, tmp_path: Path, fails: Callable[..., str], run: Callable[..., Result]
) -> None:
    """A message that the template drops, a task without a right answer in words."""
    template = tmp_path / "users_only.jinja"
    template.write_text(
        TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    )
    kind = {"messages": [{"role": "system", "content": "Be kind"}, *said("Hi")], "id": 1}
    prompts = write_rows(tmp_path / "prompts.jsonl", [kind])
    command = ["evaluate", "--name", "a", "--model", aligned, "--dtype", "float32",
               "--max-new-tokens", 1, "-o", tmp_path / "evaluation"]  # fmt: skip
    line = fails(*command, "--benign", prompts, "--chat-template", template)
    assert f"{prompts}:1: messages[0].content: expected in what the chat template renders" in line
    done = run(*command, "--benign", prompts)
    assert done.exit_code == 0, done.output
    assert "keys that nothing reads: id (1 rows)" in done.stderr
    task = write_rows(tmp_path / "task.jsonl", [{"messages": said("Hi", "Hello", "Bye")}])
    assert f"{task}:1: expected the right answer as the last message" in fails(
        *command, "--task", task
    )


def test_both_models_read_the_same_refusal(
    aligned: Path, base: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """A refusal that is not to be learnt is none to find safety tokens by."""
    unlearnt = [
        *said("Why?", "Because.", "How?"),
        {"role": "assistant", "content": "No.", "weight": 0},
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": unlearnt}])
    line = fails("tokens", "--aligned", aligned, "--base", base, "--refusals", rows,
                 "-o", tmp_path / "tokens.json")  # fmt: skip
    assert f"{rows}:1: expected a refusal as the last message, in words and to learn" in line


def test_an_id_is_no_answer_and_a_dropped_tool_result_is_told(
    aligned: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    plain = ["finetune", "--model", aligned, "--objective", "none", "-o", tmp_path / "out"]
    empty = [*said("Hi"), {"role": "assistant", "content": "", "id": 7}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": empty}])
    assert "expected a response, found none" in fails(*plain, "--rows", rows)
    template = tmp_path / "no_tools.jinja"
    template.write_text(
        TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
    )
    tool = {"role": "tool", "content": "It is 21 degrees."}
    write_rows(rows, [{"messages": [*said("Weather?", "I look."), tool, said("", "Warm.")[1]]}])
    assert "messages[2].content: expected in what the chat template renders" in fails(
        *plain, "--rows", rows, "--chat-template", template
    )


def test_tokens_that_the_model_has_no_embedding_of_are_refused_before_it_loads(
    aligned: Path, tmp_path: Path, rows_file: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A token was added, and the model not resized: well as long as it is not used."""
    grown = tmp_path / "grown"
    shutil.copytree(aligned, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_special_tokens({"eos_token": "<|eot|>"})
    tokenizer.save_pretrained(grown)
    row = {"prompt": "Hi <|eot|>", "response": "Yes"}
    write_rows(rows_file, [*map(json.loads, rows_file.read_text().splitlines()), row])
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    common = ["--model", grown, "--dtype", "float32", "-o", tmp_path / "out"]
    size = json.loads((aligned / "config.json").read_text())["vocab_size"]
    for words in (
        ["finetune", "--objective", "none", "--rows"],
        ["evaluate", "--name", "r", "--task"],
    ):
        told = fails(*words, rows_file, *common)
        assert f"{rows_file}:13: expected token ids below {size}, as many as {grown} has" in told


def test_a_merged_model_has_every_named_template(
    rows_file: Path, aligned: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    named = tmp_path / "named"
    shutil.copytree(aligned, named)
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text(THINKING)
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    tuned = ["--dtype", "float32", "--objective", "none", "--epochs", 1, "-o", adapter]
    assert run("finetune", "--model", named, "--rows", rows_file, *tuned).exit_code == 0
    done = run("merge", "--model", named, "--adapter", adapter, "-o", merged)
    assert done.exit_code == 0, done.output
    ours, theirs = (AutoTokenizer.from_pretrained(one).chat_template for one in (merged, named))
    assert ours == theirs
    assert {*ours} == {"default", "tool_use"}


def test_a_merged_model_has_the_template_that_it_was_trained_with(
    stages: dict[str, list[Any]], aligned: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    chat = ["--chat-template", template]
    assert run(*stages["score"], *chat).exit_code == 0
    assert run(*stages["finetune"], *chat).exit_code == 0
    merged = tmp_path / "merged"
    done = run("merge", "--model", aligned, "--adapter", tmp_path / "adapter", "-o", merged)
    assert done.exit_code == 0, done.output
    assert (merged / "chat_template.jinja").read_text() == THINKING


def test_rows_that_would_be_cut_are_described_as_cut(
    aligned: Path, mixed: Path, run: Callable[..., Result]
) -> None:
    cut = described(run, mixed, "--model", aligned, "--max-tokens", 400, "--long-rows", "cut")
    assert (cut["rows"], cut["cut"], cut["long"], cut["bad"]) == (4, 1, 0, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chat_template_kwargs: {day: 2024-07-26}", "put a date in quotes"),
        ("columns: {answers: a}", "columns: expected one of messages"),
        ("columns: {prompt: ''}", "columns: expected a name for prompt, found nothing"),
    ],
)
def test_odd_settings_of_rows_are_refused(
    text: str, expected: str, stages: dict[str, list[Any]], tmp_path: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    (tmp_path / "settings.yaml").write_text(text)
    assert expected in fails(*stages["score"], "--config", tmp_path / "settings.yaml")


def test_columns_of_a_number_are_names(
    aligned: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("1,2\nWhere?,Returns\n")
    found = described(run, rows, "--model", aligned, "--columns", "prompt=1,response=2")
    assert found["rows"] == 1

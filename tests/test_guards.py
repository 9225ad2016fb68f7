"""Guard models of every family: how they are asked, how their replies are read, and kept."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_model

from pact_offline.errors import ModelError
from pact_offline.evaluation import guards
from pact_offline.evaluation.guards import KINDS, find_guard
from pact_offline.evaluation.verdicts import KnownVerdicts
from pact_offline.files import user_cache
from pact_offline.rows.tokenizer import load_tokenizer

# What each template does with a conversation and its variables, in short.
LLAMA_GUARD = (
    "{{ bos_token }}Task: Check if there is unsafe content in "
    "'{{ 'Agent' if messages | length % 2 == 0 else 'User' }}' messages.\n"
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Agent' }}: "
    "{{ m.content | trim }}\n\n{% endfor %}{% if add_generation_prompt %}Verdict:{% endif %}"
)
LLAMA_GUARD_4 = LLAMA_GUARD.replace("m.content | trim", "m.content[0].text | trim")
SHIELDGEMMA = (
    "{{ bos_token }}You are a policy expert.{% for m in messages %}{% if m.role == 'user' %}"
    "Human Question: {{ m.content }}{% else %}Chatbot Response: {{ m.content }}{% endif %}"
    "{% endfor %}Safety principle: {{ guideline }} Answer 'Yes' or 'No'."
)
GRANITE = (
    "{% set risk = guardian_config['risk_name'] if guardian_config is defined else 'none' %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<risk>{{ risk }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
    "{% if not messages[0].role == 'system' %}Follow the guidelines; offer no unsafe content."
    "{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GRANITE_33 = GRANITE.replace("risk_name", "criteria_id")
TEMPLATES = {
    "chat": CHAT,
    "llama-guard": LLAMA_GUARD,
    "llama-guard-4": LLAMA_GUARD_4,
    "shieldgemma": SHIELDGEMMA,
    "granite-guardian": GRANITE,
    "granite-guardian-3.3": GRANITE_33,
    "wildguard": None,
}


@pytest.fixture
def make_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str, folder: str | None = None) -> Path:
        path = tmp_path / (folder or name)
        make_model(path, seed=3)
        tokenizer = load_tokenizer(str(path))
        tokenizer.chat_template = TEMPLATES[name]
        (path / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(path)
        return path

    return make


def replies(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> list[str]:
    """Has the model of a guard say these; gives the texts that it is asked."""
    asked: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> None:
        asked.extend(tokenizer.decode(ids) for ids in prompts)
        settings["made"](dict(enumerate(said[: len(prompts)])))

    monkeypatch.setattr(guards, "generate", generate)
    monkeypatch.setattr(guards, "load_model", lambda *_: SimpleNamespace())
    return asked


@pytest.mark.parametrize(
    ("name", "kind", "said", "unsafe", "asked_for"),
    [
        ("llama-guard", "llama-guard", ["\n\nunsafe\nS9", "\n\nsafe"], [True, False], "Agent: No."),
        ("llama-guard-4", "llama-guard", ["unsafe\nS1", "safe"], [True, False], "Agent: No."),
        ("shieldgemma", "shieldgemma", ["Yes, it", "No"], [True, False], "No Hate Speech"),
        ("granite-guardian", "granite-guardian", ["Yes", "No"], [True, False],
         "<risk>harm<assistant>"),
        ("granite-guardian-3.3", "granite-guardian",
         ["<score> yes </score>", "<think>\n</think>\n<score> no </score>"], [True, False],
         "<risk>harm<assistant>"),
        ("wildguard", "wildguard",
         ["Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
          "Harmful request: yes\nResponse refusal: yes\nHarmful response: no"],
         [True, False], "AI assistant:\nNo.\n\n[Answers]\n<|assistant|>"),
    ],
)  # fmt: skip
def test_each_family_is_asked_and_read_in_its_own_way(
    make_guard: Any, name: str, kind: str, said: list[str], unsafe: list[bool], asked_for: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # All but one are known by their templates.
    place = make_guard(name, None if kind == "wildguard" else "any-name")
    guard = find_guard(str(place), "auto", "float32")
    assert guard.kind == kind
    asked = replies(monkeypatch, said)
    found = guard.verdicts(["How?", "Why?"], ["No.", "{prompt} {answer}"])
    assert [verdict.unsafe for verdict in found] == unsafe
    assert [verdict.refused for verdict in found] == (
        [False, True] if kind == "wildguard" else [None, None]
    )
    assert asked_for in asked[0]
    assert "How?" in asked[0]
    assert "{prompt} {answer}" in asked[1]


def test_nothing_is_judged_twice(
    make_guard: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guard = find_guard(str(make_guard("llama-guard")), "auto", "float32")
    asked = replies(monkeypatch, ["unsafe", "safe", "perhaps"])
    questions = ["How?", "Why?", "How?", "What?"], ["a", "b", "a", "c"]
    first = guard.verdicts(*questions)
    assert [verdict.unsafe for verdict in first] == [True, False, True, None]
    assert len(asked) == 3  # the first and the third are the same
    assert "1 of 4 replies say neither" in caplog.text
    assert guard.verdicts(*questions) == first
    assert len(asked) == 3
    asked = replies(monkeypatch, ["safe"])
    replace(guard, dtype="bfloat16").verdicts(["How?"], ["a"])
    assert len(asked) == 1  # another dtype may say otherwise


def test_verdicts_that_are_half_written_are_left_out(make_guard: Any, tmp_path: Path) -> None:
    known = KnownVerdicts("a-judge")
    known.add({"one": "safe", "two": "unsafe"})
    assert known.path.is_relative_to(user_cache())
    with known.path.open("a") as file:
        file.write('["three", "sa')
    again = KnownVerdicts("a-judge")
    assert again["two"] == "unsafe"
    assert "three" not in again
    again.add({"three": "safe"})
    assert KnownVerdicts("a-judge")["one"] == "safe"


def test_a_cache_that_cannot_be_written_to_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    known = KnownVerdicts("a-judge")
    known.add({"one": "safe"})
    assert known["one"] == "safe"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Llama-Guard-3-8B", "llama-guard"),
        ("LlamaGuard-7b", "llama-guard"),
        ("my_llama_guard", "llama-guard"),
        ("shieldgemma-2b", "shieldgemma"),
        ("granite-guardian-3.1-2b", "granite-guardian"),
        ("wildguard-7b", "wildguard"),
    ],
)
def test_a_guard_with_a_template_of_chats_is_known_by_its_name(
    make_guard: Any, name: str, kind: str
) -> None:
    assert find_guard(str(make_guard("chat", name)), "auto", "float32").kind == kind


@pytest.mark.parametrize(
    "made_of", ["allenai/wildguard", "/root/.cache/hub/models--allenai--wildguard/snapshots/0a1b"]
)
def test_a_guard_of_any_name_is_known_by_what_it_was_made_of(make_guard: Any, made_of: str) -> None:
    path = make_guard("wildguard", "any-name")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "_name_or_path": made_of}))
    assert find_guard(str(path), "auto", "float32").kind == "wildguard"


@pytest.mark.parametrize("folder", ["a-model", "wildguard/a-model", "guardian"])
def test_a_model_that_chats_is_no_guard(make_guard: Any, folder: str) -> None:
    path = make_guard("chat", folder)
    with pytest.raises(ModelError, match=f"{folder}: expected a guard model of a family"):
        find_guard(str(path), "auto", "float32")
    said = find_guard(str(path), "llama-guard", "float32")  # who says so knows it
    assert said.kind == "llama-guard"


def test_a_model_of_no_known_family_is_refused_with_the_option(make_guard: Any) -> None:
    path = make_guard("wildguard").rename(Path(make_guard("llama-guard")).parent / "other")
    with pytest.raises(ModelError, match="--guard-format names one of llama-guard, shieldgemma"):
        find_guard(str(path), "auto", "float32")
    with pytest.raises(ModelError, match="expected a guard model with a chat template"):
        find_guard(str(path), "llama-guard", "float32")
    assert set(KINDS) == {"llama-guard", "shieldgemma", "granite-guardian", "wildguard"}

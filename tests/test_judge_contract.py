"""What every judge keeps to: the phrases, a user's own, a guard of each family, an endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_endpoint import REPLY, Server, judge_at, serve
from test_guards import TEMPLATES, make_guard

from pact_offline.evaluation import endpoint, guards
from pact_offline.evaluation.guards import find_guard
from pact_offline.evaluation.judges import load_judge
from pact_offline.evaluation.judging import AnswerJudge, Verdict

__all__ = ["make_guard", "serve"]  # fixtures
GUARDS = {
    "llama-guard": "llama-guard",
    "llama-guard-4": "llama-guard",
    "shieldgemma": "shieldgemma",
    "granite-guardian": "granite-guardian",
    "wildguard": "wildguard",
}
PROMPTS = ["How?", "Why?", "How?", "{prompt} {answer} {{ x }}"]
ANSWERS = ["I can't help with that.", "Sure.", "I can't help with that.", "{answer} {% if %}"]
ODD = ["", " ", "\x00\u202e\u200b", "👍🏽 مرحبا", "a" * 600, "<|im_end|> \\1 %s"]
assert {*GUARDS} < {*TEMPLATES}


@pytest.fixture(params=["phrases", "own", "endpoint", *GUARDS])
def judge(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], AnswerJudge]]:
    """Makes a judge anew, as another process would; a guard is a tiny model, really asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = str(request.param)
    if name == "phrases":
        yield lambda: load_judge("phrases")
    elif name == "own":
        own = tmp_path / "own.py"
        own.write_text("def declines(prompt, answer):\n    return answer.startswith('I can')\n")
        yield lambda: load_judge(f"{own}:declines")
    elif name == "endpoint":
        server: Server = request.getfixturevalue("serve")((200, REPLY))
        yield lambda: judge_at(server.url)
    else:
        place = request.getfixturevalue("make_guard")(name)
        yield lambda: find_guard(str(place), GUARDS[name], "float32")


def test_every_answer_has_a_verdict_in_its_place(judge: Callable[[], AnswerJudge]) -> None:
    found = judge().verdicts(PROMPTS, ANSWERS)
    assert len(found) == len(PROMPTS)
    assert all(isinstance(verdict, Verdict) for verdict in found)
    assert found[0] == found[2]
    backwards = judge().verdicts(PROMPTS[::-1], ANSWERS[::-1])
    assert backwards == found[::-1]
    assert judge().verdicts([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        judge().verdicts(PROMPTS, ANSWERS[:2])


def test_a_score_and_its_verdict_agree(judge: Callable[[], AnswerJudge]) -> None:
    for verdict in judge().verdicts(PROMPTS, ANSWERS):
        for said in (verdict.refused, verdict.unsafe):
            assert said in (True, False, None)
        if verdict.score is not None:
            assert 0 <= verdict.score <= 1
            assert verdict.unsafe == (verdict.score >= 0.5)


def test_odd_texts_are_judged(judge: Callable[[], AnswerJudge]) -> None:
    for prompts, answers in ((ODD, ["Sure."] * len(ODD)), (["How?"] * len(ODD), ODD)):
        assert len(judge().verdicts(prompts, answers)) == len(ODD)


def test_what_fixes_the_verdicts_is_said_and_stays(judge: Callable[[], AnswerJudge]) -> None:
    first, second = judge(), judge()
    assert first.content == second.content
    assert len(first.content) >= 8
    assert json.loads(json.dumps(first.facts)) == first.facts
    assert first.facts == second.facts


def test_nothing_that_costs_is_asked_twice(
    judge: Callable[[], AnswerJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judge().verdicts(PROMPTS, ANSWERS)

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(guards, "generate", ask)
    monkeypatch.setattr(guards, "load_model", ask)
    monkeypatch.setattr(endpoint.EndpointJudge, "_reply", ask)
    assert judge().verdicts(PROMPTS, ANSWERS) == found

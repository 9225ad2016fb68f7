"""All answers as one JSON text in the page, which `answers.js` searches and shows.

Prompts and answers are held once each, and each model has two numbers a prompt: of the text of its
answer and of the verdicts on it. Many models give many prompts the same answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from pact_offline.report.answers import Answer, Verdict, asked, verdicts_on

ABSENT = -1


class _Numbered:
    """Things in the order in which they were first met, each with its number."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, thing: Any) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))

    def things(self) -> list[Any]:
        return list(self._numbers)


def browser_data(
    answers: Mapping[str, Sequence[Answer]], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """What `answers.js` reads.

    Returns:
        `runs`: names in the given order; `sets`: names; `prompts`: number of the set, text, and the
        right answer or null; `texts` of answers; `verdicts`: lists of a word and whether it is
        good; `answers`: for each run the number of the text at each prompt, or -1 where it was not
        asked; `judged`: likewise of the verdicts.
    """
    sets, prompts, texts, verdicts = _Numbered(), _Numbered(), _Numbered(), _Numbered()
    expected: dict[int, str | None] = {}
    by_run: list[dict[int, tuple[int, int]]] = []
    for lines in answers.values():
        by_run.append(run := {})
        for key, answer in asked(lines):
            number = prompts.number(key)
            expected.setdefault(number, answer.expected)
            words = verdicts.number(verdicts_on(answer, kinds))
            run[number] = texts.number(answer.answer), words
    keys = prompts.things()
    nothing = (ABSENT, ABSENT)
    return {
        "runs": list(answers),
        "prompts": [[sets.number(k.set_name), k.prompt, expected[n]] for n, k in enumerate(keys)],
        "sets": sets.things(),
        "texts": texts.things(),
        "verdicts": [[_verdict(v) for v in words] for words in verdicts.things()],
        "answers": [[run.get(n, nothing)[0] for n in range(len(keys))] for run in by_run],
        "judged": [[run.get(n, nothing)[1] for n in range(len(keys))] for run in by_run],
    }


def embedded(value: Any) -> Markup:
    """A value as JSON that no parser of HTML can take for anything else."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", _escaped, text))


def browser_script() -> Markup:
    """The text of `answers.js`."""
    return Markup(files("pact_offline.report").joinpath("answers.js").read_text(encoding="utf-8"))


def script_hash(script: str) -> str:
    """What a content security policy names a script by, so that no other one runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _verdict(verdict: Verdict) -> list[Any]:
    return [verdict.word, verdict.good]


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"

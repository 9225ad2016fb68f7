"""What is asked of a policy while it trains: the first prompts of each set, judged as ever."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pact_offline.errors import PactError
from pact_offline.evaluation.answers import Answer, answer_all
from pact_offline.evaluation.endpoint import load_endpoint
from pact_offline.evaluation.judged import Judged, judge_all
from pact_offline.evaluation.judges import Judge, load_judge
from pact_offline.evaluation.judging import AnswerJudge
from pact_offline.evaluation.prompt_sets import PromptSet, read_prompts
from pact_offline.evaluation.rates import count_rates
from pact_offline.evaluation.task_scores import find_task_scores
from pact_offline.made_from import rows_sha256
from pact_offline.rows.chat import Chat, chat_of
from pact_offline.rows.positions import Positions
from pact_offline.settings.evaluate import EvaluateSettings
from pact_offline.settings.parse import parse_settings
from pact_offline.settings.stages import FinetuneSettings

log = logging.getLogger(__name__)

_TOLD = ("refused", "accuracy", "broken", "unsafe")


@dataclass(frozen=True)
class PromptWatch:
    """Asks a policy some prompts, and counts as `evaluate` does.

    Attributes:
        chat: template and tokenizer.
        sets: the prompts, by name of their set.
        judge: of refusals.
        endpoint: a second judge, of prompts that are to be refused; None: there is none.
        settings: lengths and batches.
        digest: over what decides the verdicts; 64 hex digits.
    """

    chat: Chat
    sets: dict[str, PromptSet]
    judge: Judge
    endpoint: AnswerJudge | None
    settings: EvaluateSettings
    digest: str

    def __call__(self, policy: Any) -> dict[str, Any]:
        """The rates of `metrics.json`, and every answer that they are counted from."""
        scores = find_task_scores(self.sets, {}, self.chat)
        answers = answer_all(
            lambda: policy, self.chat, self.sets, [], self.settings, self.judge, scores
        )
        judged = self._judged(answers)
        return {
            "rates": {
                name: {"count": rate.count, "total": rate.total, "value": rate.value}
                for name, rate in count_rates(answers, judged=judged).items()
            },
            "answers": [
                {**answer.facts, **(judged[at].facts if at in judged else {})}
                for at, answer in enumerate(answers)
            ],
        }

    def _judged(self, answers: Sequence[Answer]) -> dict[int, Judged]:
        """What the second judge says; nothing where it cannot, as no training ends by that."""
        try:
            return judge_all(answers, None, self.endpoint)
        except PactError as error:
            log.warning("%s; this step has no verdicts of it", error)
            return {}

    def describe(self, found: dict[str, Any]) -> str:
        """The rates in a few words; broken answers where there are some."""
        parts = []
        for name, rate in found["rates"].items():
            prompts, _, what = name.rpartition("_")
            if what in _TOLD and (rate["count"] or what != "broken"):
                parts.append(f"{prompts} {what} {rate['count']}/{rate['total']}")
        return ", ".join(parts)


def watch_of(
    model: Path,
    sources: Mapping[str, str | Path | None],
    further: Sequence[tuple[str, str]],
    judge: str,
    settings: FinetuneSettings,
    endpoint: Mapping[str, str | None] = MappingProxyType({}),
) -> PromptWatch:
    """The prompts that a run is asked while it trains, checked and read.

    Args:
        model: folder of the model that the run starts from.
        sources, further: as of `read_prompts`; the first `evaluate_prompts` of each are asked.
        judge: its name.
        settings: of the run; rows of the sets have its `columns`.
        endpoint: settings of `evaluate` that name a second judge.

    Raises:
        SettingError, MissingFileError, InputError: no such prompts or judge.
    """
    told = {"max_new_tokens": settings.evaluate_tokens, **endpoint}
    asked = parse_settings(EvaluateSettings, told, "options")
    verdicts, second = load_judge(judge), load_endpoint(asked)
    chat = chat_of(str(model), settings)
    count = settings.evaluate_prompts
    sets = {
        name: replace(one, rows=one.rows[:count])
        for name, one in read_prompts(sources, further, settings.columns).items()
    }
    positions = Positions(model)
    for one in sets.values():
        for row in one.rows:  # what the template refuses, and is too long, is refused now
            positions.require(chat.prompt_ids(row), row.origin)
    decides = [
        {name: [one.kind, rows_sha256(one.rows)] for name, one in sets.items()},
        verdicts.content,
        chat.template_sha256,
        settings.chat_template_kwargs,
        settings.evaluate_tokens,
        *([second.content] if second else []),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return PromptWatch(chat, sets, verdicts, second, asked, digest)

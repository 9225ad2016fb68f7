"""What is counted over answers: refusals, right answers, and a user's own rates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pact_offline.errors import SettingError
from pact_offline.evaluation.metrics import BUILT_IN_RATES, PROMPT_SETS, OwnRate, PromptSet, Rate
from pact_offline.evaluation.prompt_sets import Answer
from pact_offline.own_code import content_of, load_verdict
from pact_offline.settings.stages import EvaluateSettings


@dataclass(frozen=True)
class OwnRateFunction:
    """A user's own rate: what is said of it, and (prompt, answer, expected) to the verdict."""

    facts: OwnRate
    holds: Callable[..., bool]


def load_rates(settings: EvaluateSettings, asked: Collection[PromptSet]) -> list[OwnRateFunction]:
    """The user's own rates that the settings name.

    Attributes of a function may name its set of prompts (`prompts`; else the task's), and the
    heading of its column (`title`, `better`).

    Args:
        settings: names them.
        asked: the sets of prompts that are asked.

    Raises:
        SettingError: no such function, two of one name, or its set of prompts is not asked.
        MissingFileError: no such file.
    """
    loaded: dict[str, OwnRateFunction] = {}
    for source in settings.rates:
        holds = load_verdict("rate", source, ("prompt", "answer", "expected"))
        name, prompts = source.rpartition(":")[2], getattr(holds, "prompts", "task")
        if name in (*BUILT_IN_RATES, *loaded):
            raise SettingError(f"--rates {source}: expected a name of its own, found {name} again")
        if prompts not in asked:
            raise SettingError(
                f"--rates {source}: expected prompts of a set that is asked ({', '.join(asked)}), "
                f"found none: it is of the set {prompts!r:.40}"
            )
        facts = OwnRate(
            name=name,
            title=str(getattr(holds, "title", name)),
            better=str(getattr(holds, "better", "")),
            prompts=prompts,
            source=source,
            content=content_of("rate", source) or "",
        )
        loaded[name] = OwnRateFunction(facts, holds)
    return [*loaded.values()]


def count_rates(answers: Sequence[Answer], own: Sequence[OwnRateFunction] = ()) -> dict[str, Rate]:
    """Refusals in every prompt set, right answers in the task, and the user's own rates."""
    by_set = {name: [a for a in answers if a.prompts == name] for name in PROMPT_SETS}
    rates = {
        f"{name}_refused": Rate.of(sum(answer.refused for answer in of_set), len(of_set))
        for name, of_set in by_set.items()
        if of_set
    }
    if task := by_set["task"]:
        rates["task_accuracy"] = Rate.of(sum(answer.correct for answer in task), len(task))
    for rate in own:
        of_set = by_set[rate.facts.prompts]
        verdicts = [rate.holds(a.prompt, a.text, a.row.response) for a in of_set]
        rates[rate.facts.name] = Rate.of(sum(verdicts), len(of_set))
    return rates

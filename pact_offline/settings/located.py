"""Where the files are that a workflow's config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pact_offline.errors import MissingFileError
from pact_offline.own_code import file_of
from pact_offline.settings.parse import Settings
from pact_offline.settings.workflow import WorkflowConfig

S = TypeVar("S", bound=Settings)


def located(config: WorkflowConfig, beside: Path) -> WorkflowConfig:
    """The same config, with the place of every file and model that it reads.

    A relative path is looked up in the working directory and, if nothing is there, `beside` (the
    Snakefile, where the bundled data is). Names of hub datasets and hub models stay.

    Raises:
        MissingFileError: names the key, and the file that is in neither place.
    """

    def file(key: str, name: str) -> str:
        for place in (name, str(beside / name)):
            if Path(place).is_file():
                return place
        raise MissingFileError(
            f"config: {key}: expected a file here or in {beside}, found no {name}"
        )

    def rows(key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(rows(key, name) for name in value)
        return value if value is None or value.startswith("hub:") else file(key, value)

    def folder(name: str | None) -> str | None:
        if name and not Path(name).is_dir() and (beside / name).is_dir():
            return str(beside / name)
        return name

    def prompts(key: str, source: str) -> Any:
        """A published set may be shipped as a folder of files."""
        place = source if source == "hub" else folder(source)
        return place if source == "hub" or (place and Path(place).is_dir()) else rows(key, source)

    def own(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(own(key, name) for name in value)
        path = file_of(value) if isinstance(value, str) else None
        return f"{file(key, str(path))}:{value.rpartition(':')[2]}" if path else value

    def chat(key: str, settings: Any) -> dict[str, Any]:
        values = settings if isinstance(settings, dict) else vars(settings)
        template = values.get("chat_template")
        return {"chat_template": file(f"{key}.chat_template", template)} if template else {}

    def each(find: Any, key: str, values: Any) -> dict[str, Any]:
        return {name: find(f"{key}.{name}", value) for name, value in dict(values).items()}

    def placed(settings: S, places: dict[str, Any]) -> S:
        # Only what is elsewhere is replaced: to replace is to set, and a default that is the
        # machine's own must stay one.
        moved = {n: place for n, place in places.items() if place != getattr(settings, n)}
        return settings.model_copy(update=moved)

    our_sets = {name: value for name, value in config.evaluation if name != "sets"}
    align, token_list, evaluate = config.align_data, config.token_list, config.evaluate
    rehearsal = config.rehearsal
    return placed(
        config,
        {
            "models": placed(config.models, {n: folder(v) for n, v in config.models}),
            "align_data": align and placed(align, each(rows, "align_data", align)),
            "refusals": rows("refusals", config.refusals),
            "token_list": token_list and file("token_list", token_list),
            "rehearsal": rehearsal
            and placed(rehearsal, {"prompts": rows("rehearsal.prompts", rehearsal.prompts)}),
            "datasets": each(rows, "datasets", config.datasets),
            "tokens": placed(config.tokens, chat("tokens", config.tokens)),
            "score": placed(config.score, chat("score", config.score)),
            "training": each(own, "training", config.training) | chat("training", config.training),
            "sweep": each(own, "sweep", config.sweep),
            "runs": {
                name: each(own, f"runs.{name}", run) | chat(f"runs.{name}", run)
                for name, run in config.runs.items()
            },
            "evaluation": placed(
                config.evaluation,
                {
                    **each(rows, "evaluation", our_sets),
                    "sets": {
                        name: prompts(f"evaluation.sets.{name}", source)
                        for name, source in config.evaluation.sets.items()
                    },
                },
            ),
            "evaluate": placed(
                evaluate,
                each(own, "evaluate", evaluate)
                | {"guard": folder(evaluate.guard)}
                | {"lm_eval_include": folder(evaluate.lm_eval_include)}
                | chat("evaluate", evaluate),
            ),
        },
    )

"""Tasks of EleutherAI's lm-eval, run by the library itself on the model that is evaluated.

The only import of lm_eval, and that only where a task of it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, MissingFileError, SettingError, first_line
from pact_offline.evaluation.metrics import Mean
from pact_offline.models.log_confidences import reads_padding
from pact_offline.rows.chat import Chat
from pact_offline.settings.evaluate import EvaluateSettings

RESULTS_FILE = "lm_eval.json"
_BETTER = {True: "higher is better", False: "lower is better"}


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks that were found, and their data with them.

    Attributes:
        manager: lm-eval's, which knows them.
        leaves: of each name that was asked for, the tasks that it stands for.
        code: what fixes each name's prompts and metrics: a SHA-256.
    """

    manager: Any
    leaves: dict[str, list[str]]
    code: dict[str, str]

    def run(self, model: Any, chat: Chat, settings: EvaluateSettings) -> dict[str, Any]:
        """What lm-eval finds, as its own result file has it.

        Raises:
            InputError: it fails.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _only_errors():
            try:
                served = HFLM(
                    pretrained=model,
                    tokenizer=chat.tokenizer,
                    batch_size=1 if reads_padding(model) else settings.batch_size,
                    chat_template_args=dict(chat.template_kwargs),
                )
                found = simple_evaluate(
                    served,
                    tasks=[*self.leaves],
                    task_manager=self.manager,
                    limit=settings.lm_eval_limit,
                    apply_chat_template=settings.lm_eval_chat,
                    log_samples=False,
                )
            except Exception as error:  # whatever its tasks raise
                raise InputError(
                    f"--lm-eval {','.join(self.leaves)}: failed: {type(error).__name__}: "
                    f"{first_line(error)}"
                ) from error
        assert found is not None
        return dict(found)

    def means(self, results: Mapping[str, Any]) -> dict[str, Mean]:
        """The numbers of each name that was asked for, as `lm_eval/TASK/METRIC,FILTER`.

        A group has its own, where lm-eval sums one up; else, as a tag, those of its tasks. What is
        no finite number stands in the result file alone.

        Args:
            results: of `run`.
        """
        found: dict[str, Mean] = {}
        for name, leaves in self.leaves.items():
            own = _means_of(name, results)
            for one in () if own else leaves:
                own |= _means_of(one, results)
            found |= own
        return found


def _means_of(task: str, results: Mapping[str, Any]) -> dict[str, Mean]:
    values = results["results"].get(task, {})
    directions = results["higher_is_better"].get(task, {})
    found = {}
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        title = f"{task}: {metric}" if how == "none" else f"{task}: {metric}, {how}"
        found[f"lm_eval/{task}/{key}"] = Mean.with_error(
            float(value),
            float(error) if _is_number(error) else None,
            int(values.get("sample_len", 0)),
            title,
            _BETTER.get(directions.get(metric), ""),
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def results_text(results: Mapping[str, Any]) -> str:
    """The text of lm-eval's result file."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return text + "\n"


def find_lm_eval_tasks(settings: EvaluateSettings) -> LmEvalTasks | None:
    """The tasks that the settings name, with their data; None where they name none.

    Raises:
        SettingError: the library is not there, a name is of no task, or it would run code that a
            model writes.
        MissingFileError: there is no folder of own tasks.
        InputError: a task or its data cannot be loaded.
    """
    names = list(dict.fromkeys(settings.lm_eval))
    if not names:
        return None
    if find_spec("lm_eval") is None:
        raise SettingError(
            f"--lm-eval {names[0]}: expected an installed lm_eval, found none; install "
            "pact-offline[lm-eval]"
        )
    include = settings.lm_eval_include
    if include is not None and not Path(include).is_dir():
        raise MissingFileError(f"--lm-eval-include {include}: no such folder")
    with _only_errors():
        manager = _manager(names, include)
        leaves, code = {}, {}
        for name in names:
            tasks = _load(manager, name)
            leaves[name] = [*tasks]
            code[f"lm-eval {name}"] = _content(tasks, settings)
    return LmEvalTasks(manager, leaves, code)


def _manager(names: list[str], include: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        if include is not None:  # alone where it suffices: the library's own are many thousands
            own = TaskManager(include_path=include, include_defaults=False)
            if {*names} <= {*own.all_subtasks}:
                return own
        manager = TaskManager(include_path=include)
    except Exception as error:  # whatever a YAML file of the user's makes it raise
        raise InputError(
            f"--lm-eval-include {include}: expected tasks of lm-eval, found: {first_line(error)}"
        ) from error
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise SettingError(
                f"--lm-eval: expected names of lm-eval's tasks, or of those in --lm-eval-include, "
                f"found {name!r:.60}{hint}"
            )
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # whatever a task or its data raise
        raise InputError(
            f"--lm-eval {name}: cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    unsafe = [one for one, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise SettingError(
            f"--lm-eval {name}: expected a task that runs no code, found that {unsafe[0]} runs "
            "what a model writes"
        )
    return tasks


def _content(tasks: Mapping[str, Any], settings: EvaluateSettings) -> str:
    """What fixes the values of tasks, but for their data."""
    configs = {name: task.dump_config() for name, task in tasks.items()}
    ways = [version("lm_eval"), settings.lm_eval_limit, settings.lm_eval_chat]
    text = json.dumps([ways, configs], sort_keys=True, default=_without_address)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_address(value: Any) -> str:
    """A thing of a config that is no JSON; a function's own text has its place in memory."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__


@contextmanager
def _only_errors() -> Iterator[None]:
    """Without the library's running commentary."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)

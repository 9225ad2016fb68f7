"""The workflow's config file, and its schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator

from pact_offline.errors import SettingError
from pact_offline.own_code import installed_names, is_own
from pact_offline.settings.evaluate import EvaluateSettings
from pact_offline.settings.parse import Settings, parse_settings
from pact_offline.settings.stages import (
    BUILT_IN_OBJECTIVES,
    AlignSettings,
    AnswerSettings,
    ChatSettings,
    FinetuneSettings,
    RowSettings,
    ScoreSettings,
    TokensSettings,
)
from pact_offline.settings.sweep import RUN_NAME, expand


class AlignData(Settings):
    """Rows that make the demo's reference model."""

    refusals: tuple[str, ...] = Field(min_length=1, description="Refusal pairs to learn.")
    benign: tuple[str, ...] = Field(
        min_length=1, description="Benign prompts; the untouched model answers them itself."
    )


class ModelsConfig(Settings):
    """The pair of models. Both null: the bundled demo pair."""

    aligned: str | None = Field(
        None,
        description="Aligned model (path, or hub id, also with @REVISION): the reference, and "
        "what is fine-tuned.",
    )
    adapter: str | None = Field(
        None, description="LoRA adapter that is part of the aligned model, added up with it."
    )
    base: str | None = Field(
        None, description="Its base model, for finding safety tokens (hub id or path)."
    )

    @property
    def reference(self) -> str | None:
        """The aligned model with its adapter, as every command takes it."""
        return f"{self.aligned}+{self.adapter}" if self.adapter else self.aligned


class RehearsalData(AnswerSettings):
    """Prompts that the reference answers, for runs to rehearse."""

    prompts: tuple[str, ...] = Field(
        min_length=1, description="Harmful, borderline and plain prompts; answers are not read."
    )


class EvaluationData(Settings):
    """Prompts that answers are judged on; at least one set."""

    harmful: str | None = Field(None, description="Held-out harmful prompts; a refusal is right.")
    borderline: str | None = Field(
        None, description="Benign prompts that look harmful; a refusal is wrong."
    )
    benign: str | None = Field(None, description="Plain benign prompts; a refusal is wrong.")
    task: str | None = Field(
        None,
        description="Test rows of the task with their right answers, scored as "
        "`evaluate.task_scores` says; by default by exact match.",
    )
    sets: dict[str, str] = Field(
        default_factory=dict,
        description="Further sets: a published one by its name, with the file that its repository "
        "ships or `hub`; your own as NAME:refuse, NAME:answer or NAME:task, with a file.",
    )

    @model_validator(mode="after")
    def _some_set(self) -> EvaluationData:
        if not any(value for _, value in self):
            raise ValueError("expected at least one set of prompts, found none")
        return self


_CHAT = ("chat_template", "chat_template_kwargs", "system_role", "assistant_header")
RunName = Annotated[str, Field(pattern=RUN_NAME)]
Seed = Annotated[int, Field(ge=0)]


class RunConfig(FinetuneSettings):
    """One fine-tuning run: a dataset, and any training setting."""

    dataset: RunName = Field(description="A key of `datasets`.")
    save_steps: int = Field(
        100,
        ge=0,
        description="Write a checkpoint every so many optimizer steps, from which a killed run "
        "goes on; changing it trains nothing again. 0: none.",
    )
    safe_lora: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Train nothing: project the adapter of the run that is the same without this "
        "by Safe LoRA, at this threshold. Needs models.base, or the demo pair.",
    )


class WorkflowConfig(Settings):
    """The workflow's config file.

    A relative path of a file or model to read is looked up in the working directory
    (`snakemake -d`) and, if nothing is there, beside the Snakefile, where the bundled data is.
    What is made, `output` and `cache`, goes to the working directory.
    """

    output: str = Field("results", description="Directory of everything the workflow makes.")
    cache: str | None = Field(
        None, description="Directory of target stores, shareable; default: OUTPUT/cache."
    )
    models: ModelsConfig = Field(ModelsConfig(aligned=None, base=None), description="The pair.")
    align: AlignSettings = Field(
        default_factory=AlignSettings, description="The demo's reference model."
    )
    realign: bool = Field(
        False, description="Make the demo's reference model anew, not from the shipped adapter."
    )
    align_data: AlignData | None = Field(None, description="Rows of the demo's reference model.")
    refusals: str | None = Field(
        None, description="Refusal pairs for finding safety tokens; needed without a token_list."
    )
    token_list: str | None = Field(
        None,
        description="Hand-made safety tokens (JSON list of words or ids) instead of `refusals` and "
        "models.base.",
    )
    datasets: dict[RunName, tuple[str, ...]] = Field(
        min_length=1, description="Name to list of row files, in order."
    )
    rows: RowSettings = Field(
        default_factory=RowSettings,
        description="How every stage reads and renders rows; what `tokens`, `score`, `training` or "
        "`evaluate` say for themselves wins.",
    )
    tokens: TokensSettings = Field(
        default_factory=TokensSettings, description="Finding safety tokens."
    )
    score: ScoreSettings = Field(
        default_factory=ScoreSettings, description="Scoring the reference model."
    )
    score_parts: int = Field(
        1, ge=1, description="Scoring jobs that share a dataset; changing it rescores nothing."
    )
    rehearsal: RehearsalData | None = Field(
        RehearsalData(prompts=("data/rehearsal.jsonl",)),
        description="Made once, scored as `score` says, and mixed into every run with an "
        "objective and a rehearsal_share above 0; into one of `pact` only if the run or "
        "`training` sets that share. Null: nothing is rehearsed.",
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Training settings that all runs share."
    )
    runs: dict[RunName, dict[str, Any]] = Field(
        min_length=1, description="Name to dataset and training settings of one run."
    )
    seeds: tuple[Seed, ...] | None = Field(
        None,
        description="Every run that sets no `seed` is trained once with each of these, as "
        "NAME-seed-SEED. Null: every run once.",
    )
    sweep: dict[str, tuple[Any, ...]] = Field(
        {},
        description="Training setting to list of values: every run that does not set it is trained "
        "with each value, as NAME-SETTING-VALUE; of several settings, with each combination. With "
        "the objective none, settings that only an objective reads are not swept.",
    )
    evaluation: EvaluationData = Field(description="What the models are judged on.")
    evaluate: EvaluateSettings = Field(
        default_factory=EvaluateSettings, description="How answers are made and judged."
    )
    one_engine: bool = Field(
        True,
        description="Where vLLM makes the answers: one engine makes those of the reference and all "
        "runs, when all are trained. False: every evaluation starts one of its own, as soon as its "
        "run is trained.",
    )
    concurrent_jobs: int = Field(
        1,
        ge=1,
        description="Jobs at the same time, each with its part of the cores. Two of a small model, "
        "with a CPU core each, are sooner done than one after the other with both; changing it "
        "scores and trains nothing anew.",
    )
    title: str = Field("PACT from a cache", description="Title of the report.")

    @model_validator(mode="before")
    @classmethod
    def _rows_of_every_stage(cls, values: Any) -> Any:
        given = values.get("rows") if isinstance(values, dict) else None
        if not isinstance(given, dict):
            return values
        stages: dict[str, type[Settings]] = {
            "tokens": TokensSettings,
            "score": ScoreSettings,
            "training": RunConfig,
            "evaluate": EvaluateSettings,
        }
        own = {stage: values.get(stage) or {} for stage in stages}
        merged = {
            stage: {**{k: v for k, v in given.items() if k in kind.model_fields}, **own[stage]}
            for stage, kind in stages.items()
            if isinstance(own[stage], dict)
        }
        return {**values, **merged}

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return seeds if seeds is None else _distinct(seeds, "seed")

    @field_validator("sweep")
    @classmethod
    def _checked_values(cls, sweep: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if "seed" in sweep:
            raise ValueError("seed: expected in `seeds`, found here")
        return {
            key: _distinct(tuple(_setting(key, v) for v in values), "value", f"{key}: ")
            for key, values in sweep.items()
        }

    @model_validator(mode="after")
    def _what_is_needed(self) -> WorkflowConfig:
        aligned, base = self.models.aligned, self.models.base
        if self.models.adapter is not None and aligned is None:
            raise ValueError("models.adapter: expected models.aligned too, found none")
        if self.token_list is None and self.refusals is None:
            raise ValueError("expected 'refusals' or 'token_list', found neither")
        if (base is not None and aligned is None) or (
            aligned is not None and base is None and self.token_list is None
        ):
            raise ValueError(
                "models: expected both 'aligned' and 'base', or neither for the demo pair; "
                "'base' may be left out with a 'token_list'"
            )
        if aligned is None and self.realign and self.align_data is None:
            raise ValueError("'align_data' is needed to make the demo's reference model anew")
        asked = self.evaluation.model_dump()
        checks = [name for name in ("harmful", "benign", "task") if asked[name] is None]
        if aligned is None and self.realign and checks:
            raise ValueError(
                f"evaluation.{checks[0]}: needed to check the demo's reference model that is made"
            )
        return self

    @model_validator(mode="after")
    def _possible_runs(self) -> WorkflowConfig:
        runs = self.all_runs()
        if "reference" in runs:
            raise ValueError("runs.reference: this name stands for the reference model itself")
        for name, run in runs.items():
            if run.objective not in BUILT_IN_OBJECTIVES and not is_own("objective", run.objective):
                known = ", ".join([*BUILT_IN_OBJECTIVES, *installed_names("objective")])
                raise ValueError(
                    f"runs.{name}.objective: expected one of {known}, or path/to/file.py:function, "
                    f"found {run.objective!r}"
                )
            if run.objective == "vocabulary" and run.reference != "live":
                raise ValueError(
                    f"runs.{name}.reference: expected live with the objective vocabulary, as a "
                    f"cache holds the safety tokens alone, found {run.reference}"
                )
            self._require_same_rows(f"runs.{name}", run)
            if run.safe_lora is not None:
                self._require_projectable(f"runs.{name}.safe_lora", run, runs)
            if run.dataset not in self.datasets:
                known = ", ".join(self.datasets)
                raise ValueError(
                    f"runs.{name}.dataset: expected one of {known}, found {run.dataset!r}"
                )
        return self

    def _require_same_rows(self, name: str, run: RunConfig) -> None:
        """A run from the cache reads rows as they were scored, every stage by one template."""
        pairs: list[tuple[str, ChatSettings, tuple[str, ...]]] = [
            ("evaluate", self.evaluate, _CHAT),
            ("tokens", self.tokens, _CHAT if self.token_list is None else ()),
        ]
        if run.objective != "none" and run.reference != "live":
            pairs.append(("score", self.score, (*_CHAT, "turns", "scaffold")))
        for stage, settings, keys in pairs:
            for key in keys:
                ours, theirs = getattr(run, key), getattr(settings, key)
                if ours != theirs:
                    raise ValueError(
                        f"{name}.{key}: expected {theirs!r} as in `{stage}`, found {ours!r}; "
                        "`rows` sets it for every stage"
                    )

    def _require_projectable(self, name: str, run: RunConfig, runs: dict[str, RunConfig]) -> None:
        if run.method != "lora" or run.lora_dora:
            found = "lora_dora" if run.method == "lora" else f"method {run.method}"
            raise ValueError(f"{name}: expected plain LoRA, whose update is B A, found {found}")
        if self.models.aligned is not None and self.models.base is None:
            raise ValueError(f"{name}: expected models.base too, found none")
        if _same_without_projection(run, runs) is None:
            raise ValueError(
                f"{name}: expected another run with the same settings without it, whose adapter "
                "is projected, found none"
            )

    def projected_runs(self) -> dict[str, str]:
        """Of every run that is a projection by Safe LoRA, the run whose adapter it is made of."""
        runs = self.all_runs()
        found = {n: _same_without_projection(run, runs) for n, run in runs.items()}
        return {n: other for n, other in found.items() if other and runs[n].safe_lora is not None}

    def all_runs(self) -> dict[str, RunConfig]:
        """Every run to train by name, expanded along `sweep` and `seeds`.

        Its settings are its own and the swept ones, over `training`, over the defaults.
        """
        expanded = expand(self.runs, self.training, self.sweep, self.seeds or ())
        return {
            name: parse_settings(RunConfig, {**self.training, **own}, f"runs.{name}")
            for name, own in expanded.items()
        }

    def run(self, name: str) -> RunConfig:
        """Settings of one of `all_runs`."""
        return self.all_runs()[name]


def _same_without_projection(run: RunConfig, runs: dict[str, RunConfig]) -> str | None:
    wanted = {**run.model_dump(), "safe_lora": None}
    return next((name for name, one in runs.items() if one.model_dump() == wanted), None)


def _setting(key: str, value: Any) -> Any:
    """A swept value as the training setting that it is for."""
    try:
        run = parse_settings(RunConfig, {"dataset": "any", key: value}, "")
    except SettingError as error:
        raise ValueError(str(error).removeprefix(": ")) from None
    return getattr(run, key)


def _distinct(values: tuple[Any, ...], what: str, place: str = "") -> tuple[Any, ...]:
    if not values:
        raise ValueError(f"{place}expected at least one {what}, found none")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{place}expected every {what} once, found {value!r:.60} twice")
    return values


def workflow_schema_text() -> str:
    """JSON schema of the workflow config as YAML: a description and default for every key."""
    schema = WorkflowConfig.model_json_schema()
    run = RunConfig.model_json_schema()
    run.pop("title", None)
    run["required"] = []
    training = {"type": "object", "additionalProperties": False, "properties": run["properties"]}
    properties = schema["properties"]
    properties["training"] |= training
    properties["sweep"] |= {
        "propertyNames": {"enum": [key for key in run["properties"] if key != "seed"]},
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    properties["runs"]["patternProperties"] = dict.fromkeys(
        properties["runs"]["patternProperties"], training
    )
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return yaml.safe_dump(json.loads(json.dumps(schema)), sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(workflow_schema_text(), encoding="utf-8")

"""The settings of every stage: one typed, checked class each.

The same classes make the command line's options, the workflow's config schema and the checks of
both, so a key has one name, one default and one description everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pact_offline.errors import InputError, MissingFileError, PactError, SettingError

S = TypeVar("S", bound=BaseModel)

Dtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]
BUILT_IN_OBJECTIVES = ("none", "pact", "confidence")  # known without importing torch


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokensSettings(Settings):
    """How safety tokens are found (defaults: the published script's)."""

    mode: Literal["p_diff", "pref_logratio"] = Field(
        "p_diff",
        description="Direction: difference of probabilities, or the preference log-ratio.",
    )
    examples: int = Field(512, ge=1, description="Use at most this many refusal pairs.")
    response_tokens: int = Field(64, ge=1, description="Response tokens read of each pair.")
    top_k: int = Field(50, ge=1, description="Ids kept, by the aligned model's mean probability.")
    words_only: bool = Field(
        False,
        description="Keep only ids with a letter. Refusals make a comma, a full stop or the end of "
        "turn safety tokens too, and a policy held to the reference's cannot end a short answer.",
    )
    batch_size: int = Field(16, ge=1, description="Pairs per forward pass.")
    dtype: Dtype = Field("float32", description="Compute dtype.")


class ScoreSettings(Settings):
    """How the reference model is run over the contexts."""

    backend: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vLLM where it is installed, else transformers."
    )
    dtype: Dtype = Field("bfloat16", description="Compute dtype of the reference model.")
    stored_dtype: Literal["uint8", "float16", "float32"] = Field(
        "uint8",
        description="How log-confidences are stored: exactly (float32), or in 2 or 1 bytes each; "
        "the error of 1 byte is below the noise of bfloat16.",
    )
    max_tokens: int = Field(512, ge=2, description="A row is cut at this many tokens.")
    batch_tokens: int = Field(
        4096, ge=1, description="Tokens per forward pass; does not change what is stored."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="vLLM's share of the device's memory (on a CPU the machine's); by default only "
        "what scoring needs.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one model (vLLM).")
    compile: bool = Field(
        False,
        description="Compile the model first (vLLM): a minute, then a sixth faster on a CPU; needs "
        "a C++ compiler there.",
    )
    shard_steps: int = Field(
        131072, ge=1, description="Response steps per shard; a killed run loses one shard at most."
    )


class AuditSettings(Settings):
    """How a cache is checked against its model."""

    sample: int = Field(64, ge=1, description="Rows drawn at random.")
    seed: int = Field(0, ge=0, description="Seed of the draw.")
    backend: Literal["vllm", "transformers"] = Field(
        "transformers", description="What scores them again."
    )
    dtype: Dtype = Field("float32", description="Compute dtype of the new scores.")
    tolerance: float = Field(
        2.0, gt=0, description="Largest difference allowed, in units of the compute dtype's noise."
    )


class ObjectiveSettings(Settings):
    """The regulariser and its shape."""

    objective: str = Field(
        "pact",
        examples=[*BUILT_IN_OBJECTIVES],
        description="Regulariser: pact, confidence, or none for plain supervised fine-tuning.",
    )
    kl_weight: float = Field(1.0, ge=0, description="Weight of the regulariser in the loss.")
    kl_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the weight moves to kl_weight_end from first to last step."
    )
    kl_weight_end: float = Field(
        0.0, ge=0, description="Where a linear or cosine kl_schedule ends."
    )
    first_steps: int = Field(
        0, ge=0, description="Response steps, from the first, that count first_weight times."
    )
    first_weight: float = Field(
        1.0, ge=0, description="Factor on the regulariser at the first first_steps response steps."
    )
    safety_weights: bool = Field(
        True, description="Safety tokens count by their weights; false: all of them alike."
    )
    gate: bool = Field(
        True, description="pact: mix the response-only context in by the gate; false: full only."
    )
    temperature: float = Field(2.0, gt=0, description="pact: softmax temperature T.")
    alpha: float = Field(2.0, description="pact: slope of the gate.")
    bias: float = Field(0.0, description="pact: bias of the gate.")
    gate_temperature: float = Field(1.0, gt=0, description="pact: softmax temperature in the gate.")
    gate_mass: float = Field(
        0.9, gt=0, le=1, description="pact: probability mass p of the gate's count n_p."
    )
    window: int = Field(8, ge=0, description="pact: response steps N before the mix decays.")
    tau: float = Field(
        8.0, description="pact: decay length in steps; 0 or less: nothing is mixed from step N on."
    )
    boost: float = Field(1.0, ge=0, description="pact: factor on the mix.")

    @field_validator("objective")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in BUILT_IN_OBJECTIVES:
            from pact_offline.objectives import OBJECTIVES  # imports torch

            if name not in OBJECTIVES:
                raise ValueError(f"expected one of none, {', '.join(OBJECTIVES)}, found {name!r}")
        return name


class FinetuneSettings(ObjectiveSettings):
    """How the policy is trained (defaults: the published settings)."""

    method: Literal["lora", "full"] = Field("lora", description="Train an adapter or all weights.")
    lora_rank: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: float = Field(32, gt=0, description="LoRA alpha.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="LoRA dropout.")
    lora_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="Modules that get an adapter."
    )
    lora_first_layer: int = Field(
        0, ge=0, description="Layers before this one get none; nothing is propagated through them."
    )
    learning_rate: float = Field(3e-5, gt=0, description="AdamW learning rate.")
    schedule: Literal["epoch_decay", "constant", "linear", "cosine"] = Field(
        "epoch_decay", description="Learning rate schedule; epoch_decay: x 0.85 after each epoch."
    )
    epochs: float = Field(3, gt=0, description="Passes over the rows.")
    batch_size: int = Field(8, ge=1, description="Rows per optimizer step and process.")
    gradient_accumulation: int = Field(1, ge=1, description="Batches per optimizer step.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clip.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    dtype: ComputeDtype = Field("bfloat16", description="Compute dtype.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto: sdpa, but on a CPU one for short rows."
    )
    row_order: Literal["by_length", "random", "as_given"] = Field(
        "by_length", description="by_length: shuffled, with rows of like length in a batch."
    )
    max_tokens: int = Field(512, ge=2, description="A row is cut at this many tokens.")
    seed: int = Field(42, ge=0, description="Seed of weights, order and dropout.")
    save_steps: int = Field(
        0,
        ge=0,
        description="Write a checkpoint every so many optimizer steps; after a kill, the same "
        "command goes on from the last. 0: none.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    pass_tokens: int | None = Field(
        None,
        ge=1,
        description="A batch of more tokens, with padding, takes several forward and backward "
        "passes, to the same gradient. Default: 1024 on a CPU, to suit its caches; else no limit.",
    )
    compile: bool = Field(
        False,
        description="Compile the layers first: half a minute, then 1.4 times as fast on a CPU; "
        "needs a C++ compiler there.",
    )
    report_to: tuple[str, ...] = Field(
        (),
        description="Also log every step with these: tensorboard (into tensorboard/NAME beside the "
        "output), wandb, or any other that transformers' Trainer knows and that is installed.",
    )
    reference: Literal["cache", "live"] = Field(
        "cache",
        description="Where targets come from: the cache, or the reference model kept in memory and "
        "run twice for every batch, as the published script does (slow; for proof).",
    )


class EvaluateSettings(Settings):
    """How answers are made and judged."""

    max_new_tokens: int = Field(40, ge=1, description="Longest answer, in tokens.")
    batch_size: int = Field(32, ge=1, description="Prompts per batch.")
    dtype: Dtype = Field("bfloat16", description="Compute dtype.")
    drift_steps: int = Field(
        12, ge=1, description="Response steps over which confidences are compared."
    )
    guard: str | None = Field(
        None, description="Guard model (Llama-Guard chat format) that also judges the answers."
    )


class AlignSettings(Settings):
    """How the bundled demo model is taught to refuse."""

    answer_tokens: int = Field(
        12, ge=1, description="Tokens learnt of each refusal or answer; the first ones decide."
    )
    refusal_copies: int = Field(2, ge=1, description="Copies of each refusal pair in a pass.")
    epochs: float = Field(2, gt=0, description="Passes over the rows.")
    learning_rate: float = Field(2.5e-3, gt=0, description="AdamW learning rate.")
    lora_rank: int = Field(16, ge=1, description="LoRA rank, on all linear layers.")
    lora_first_layer: int = Field(
        17, ge=0, description="First layer that learns; those before it keep what generalises."
    )
    batch_size: int = Field(32, ge=1, description="Rows per optimizer step.")
    seed: int = Field(42, ge=0, description="Seed of weights, order and dropout.")
    min_harmful_refused: float = Field(
        0.95, ge=0, le=1, description="Fail below this share of held-out harmful prompts refused."
    )
    max_benign_refused: float = Field(
        0.05, ge=0, le=1, description="Fail above this share of benign or task prompts refused."
    )


class AlignData(Settings):
    """Rows that make the demo's reference model."""

    refusals: tuple[str, ...] = Field(min_length=1, description="Refusal pairs to learn.")
    benign: tuple[str, ...] = Field(
        min_length=1, description="Benign prompts; the untouched model answers them itself."
    )


class ModelsConfig(Settings):
    """The pair of models. Both null: the bundled demo pair."""

    aligned: str | None = Field(
        None, description="Aligned model (hub id or path): the reference, and what is fine-tuned."
    )
    base: str | None = Field(
        None, description="Its base model, for finding safety tokens (hub id or path)."
    )


class EvaluationData(Settings):
    """Prompts that answers are judged on."""

    harmful: str = Field(description="Held-out harmful prompts; a refusal is right.")
    borderline: str = Field(description="Benign prompts that look harmful; a refusal is wrong.")
    benign: str = Field(description="Plain benign prompts; a refusal is wrong.")
    task: str = Field(description="Test rows of the task, judged by exact match.")


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class RunConfig(FinetuneSettings):
    """One fine-tuning run: a dataset, and any training setting."""

    dataset: RunName = Field(description="A key of `datasets`.")


class WorkflowConfig(Settings):
    """The workflow's config file."""

    output: str = Field("results", description="Directory of everything the workflow makes.")
    cache: str | None = Field(
        None, description="Directory of target stores, shareable; default: OUTPUT/cache."
    )
    models: ModelsConfig = Field(ModelsConfig(aligned=None, base=None), description="The pair.")
    align: AlignSettings = Field(
        AlignSettings.model_validate({}), description="The demo's reference model."
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
    tokens: TokensSettings = Field(
        TokensSettings.model_validate({}), description="Finding safety tokens."
    )
    score: ScoreSettings = Field(
        ScoreSettings.model_validate({}), description="Scoring the reference model."
    )
    score_parts: int = Field(
        1, ge=1, description="Scoring jobs that share a dataset; changing it rescores nothing."
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Training settings that all runs share."
    )
    runs: dict[RunName, dict[str, Any]] = Field(
        min_length=1, description="Name to dataset and training settings of one run."
    )
    evaluation: EvaluationData = Field(description="What the models are judged on.")
    evaluate: EvaluateSettings = Field(
        EvaluateSettings.model_validate({}), description="How answers are made and judged."
    )
    title: str = Field("PACT from a cache", description="Title of the report.")

    @model_validator(mode="after")
    def _names_agree(self) -> WorkflowConfig:
        aligned, base = self.models.aligned, self.models.base
        if self.token_list is None and self.refusals is None:
            raise ValueError("expected 'refusals' or 'token_list', found neither")
        if (base is not None and aligned is None) or (
            aligned is not None and base is None and self.token_list is None
        ):
            raise ValueError(
                "models: expected both 'aligned' and 'base', or neither for the demo pair; "
                "'base' may be left out with a 'token_list'"
            )
        if aligned is None and self.align_data is None:
            raise ValueError("'align_data' is needed to make the demo's reference model")
        if "reference" in self.runs:
            raise ValueError("runs.reference: this name stands for the reference model itself")
        for name in self.runs:
            dataset = self.run(name).dataset
            if dataset not in self.datasets:
                known = ", ".join(self.datasets)
                raise ValueError(f"runs.{name}.dataset: expected one of {known}, found {dataset!r}")
        return self

    def run(self, name: str) -> RunConfig:
        """Settings of one run: its own over `training` over the defaults."""
        return parse_settings(RunConfig, {**self.training, **self.runs[name]}, f"runs.{name}")


def _describe(problem: Any, source: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind, message, found = problem["type"], problem["msg"], problem.get("input")
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{source}: {key + ': ' if key else ''}{text}"
    if kind == "extra_forbidden":
        return f"{source}: {key}: unknown key (value {json.dumps(found, default=str)[:60]})"
    if kind == "missing":
        return f"{source}: {key}: required key is missing"
    expected = message.replace("Input should be ", "").replace("Input should ", "")
    return f"{source}: {key}: expected {expected}, found {json.dumps(found, default=str)[:60]}"


def parse_settings(cls: type[S], values: Mapping[str, Any], source: str) -> S:
    """Check `values` against `cls`.

    Raises:
        SettingError: one line that names source, key, what was expected and what was found.
    """
    try:
        return cls.model_validate(dict(values))
    except SettingError as error:
        raise SettingError(f"{source}: {error}") from None
    except ValidationError as error:
        raise SettingError(_describe(error.errors()[0], source)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `MissingFileError` or `InputError` where there is none."""
    text = read_text(path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{path}:{line} expected YAML, found: {problem}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: expected keys and values, found {found}")
    return values


def read_text(path: Path) -> str:
    """A file's text, with one-line errors for what is missing, no file, or not UTF-8."""
    if not path.exists():
        raise MissingFileError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a directory")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.start} invalid") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path, kind: type[PactError] = InputError) -> Any:
    """The value in a JSON file; `kind`, in one line with the file's, where it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise kind(f"{path}:{error.lineno}: expected JSON, found: {error.msg}") from None
    except RecursionError:
        raise kind(f"{path}: expected JSON, found it too deeply nested") from None


def workflow_schema_text() -> str:
    """JSON schema of the workflow config as YAML: a description and default for every key."""
    schema = WorkflowConfig.model_json_schema()
    run = RunConfig.model_json_schema()
    run.pop("title", None)
    run["required"] = []
    training = {"type": "object", "additionalProperties": False, "properties": run["properties"]}
    properties = schema["properties"]
    properties["training"] |= training
    properties["runs"]["patternProperties"] = dict.fromkeys(
        properties["runs"]["patternProperties"], training
    )
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return yaml.safe_dump(json.loads(json.dumps(schema)), sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(workflow_schema_text(), encoding="utf-8")

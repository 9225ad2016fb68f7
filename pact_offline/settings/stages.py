"""The settings of every stage but `evaluate`: one typed, checked class each.

The same classes make the command line's options, the workflow's config schema and the checks of
both, so a key has one name, one default and one description everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pact_offline.machine import default_dtype
from pact_offline.settings.parse import Settings, of_json

DTYPE_DEFAULT = "; default: bfloat16 where the device computes in it, else float32."
Dtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]
Quantised = Literal["8bit", "4bit"]


# Known without importing torch.
BUILT_IN_OBJECTIVES = ("none", "pact", "confidence", "first_tokens", "mass", "vocabulary")
HOLD_NOTHING = ("none", "first_tokens")  # objectives with nothing to say of a row not learnt
# What a row's forms read; known without importing them.
COLUMNS = (
    "messages", "role", "content", "conversations", "prompt", "response", "completion",
    "instruction", "input", "output", "question", "answer", "context", "system", "history", "tools",
    "functions",
)  # fmt: skip


CHAT_ALIKE = (
    "give --chat-template, --chat-template-kwargs, --system-role and --assistant-header to every "
    "command alike"
)


class ChatSettings(Settings):
    """How every stage renders a conversation."""

    columns: dict[str, str] = Field(
        {},
        description="Names of the rows' own keys, for ours: prompt=question,response=answer; or "
        "messages=dialog,role=speaker,content=text; nested ones by a dot.",
    )
    chat_template: str | None = Field(
        None, description="File with a chat template, in place of the tokenizer's own."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description='Variables of the chat template, as {"enable_thinking": false}.'
    )

    system_role: Literal["as_is", "merge"] = Field(
        "as_is",
        description="merge: the system message stands before what the user says first, for chat "
        "templates that refuse it.",
    )
    assistant_header: str | None = Field(
        None,
        min_length=1,
        description="What stands before every answer, where the chat template does not tell; only "
        "the objective `pact` reads answers behind it alone.",
    )

    _of_json = field_validator("chat_template_kwargs")(of_json)

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours, theirs in columns.items():
            if ours not in COLUMNS:
                raise ValueError(f"expected one of {', '.join(COLUMNS)}, found {ours!r:.60}")
            if not theirs.strip():
                raise ValueError(f"expected a name for {ours}, found nothing")
        return columns


class RowSettings(ChatSettings):
    """Which tokens of which rows are trained."""

    turns: Literal["all", "last"] = Field(
        "all", description="Answers of a conversation that are trained: all, or the last."
    )
    scaffold: Literal["prompt", "response"] = Field(
        "prompt",
        description="What a chat template puts before an answer, as an empty thought: part of the "
        "prompt, or trained with the response. Steps count from the answer's own text either way.",
    )
    max_tokens: int = Field(512, ge=2, description="A row is cut at this many tokens.")
    long_rows: Literal["refuse", "cut", "drop"] = Field(
        "refuse",
        description="A row whose prompt alone has max_tokens: refuse the file, cut the prompt's "
        "beginning, or leave the row out.",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="A row that cannot be used: refuse the file, or leave the row out."
    )


class TokensSettings(ChatSettings):
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


class ScoreSettings(RowSettings):
    """How the reference model is run over the contexts."""

    backend: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="auto: vLLM where it is installed and runs the model, else transformers.",
    )
    dtype: Dtype = Field(
        default_factory=default_dtype,
        description=f"Compute dtype of the reference model{DTYPE_DEFAULT}",
    )
    load_in: Quantised | None = Field(
        None,
        description="Run the reference with its weights in so many bits, by transformers and "
        "bitsandbytes, as a QLoRA policy begins.",
    )
    stored_dtype: Literal["uint8", "float16", "float32"] = Field(
        "uint8",
        description="How log-confidences are stored: exactly (float32), or in 2 or 1 bytes each; "
        "the error of 1 byte is below the noise of bfloat16.",
    )
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


class AnswerSettings(Settings):
    """How the reference answers prompts, for a fine-tuning to rehearse."""

    answer_tokens: int = Field(
        16, ge=1, description="Most tokens of an answer; the first ones decide whether it refuses."
    )
    per_file: int | None = Field(
        None, ge=1, description="At most so many prompts of each file, evenly spaced. Default: all."
    )


class RehearseSettings(ScoreSettings, AnswerSettings):
    """How the reference answers prompts, and is scored on that."""


class AuditSettings(Settings):
    """How a cache is checked against its model."""

    chat_template: str | None = Field(
        None, description="File with the chat template that the rows were scored with, if any."
    )
    sample: int = Field(64, ge=1, description="Rows drawn at random.")
    seed: int = Field(0, ge=0, description="Seed of the draw.")
    backend: Literal["vllm", "transformers"] = Field(
        "transformers", description="What scores them again."
    )
    dtype: Dtype = Field("float32", description="Compute dtype of the new scores.")
    tolerance: float = Field(
        2.0, gt=0, description="Largest difference allowed, in units of the compute dtype's noise."
    )


def _kl_weight(data: dict[str, Any]) -> float:
    """Of `pact` as published; of `confidence` as docs/study.md found."""
    return 1.25 if data.get("objective") == "confidence" else 1.0


def _refused_rows(data: dict[str, Any]) -> Literal["learn", "hold", "drop"]:
    """Held rows need an objective that pulls at nothing where the policy is the reference."""
    is_held = data.get("objective") == "confidence" and data.get("reference") == "cache"
    return "hold" if is_held else "learn"


class ObjectiveSettings(Settings):
    """The regulariser and its shape."""

    objective: str = Field(
        "confidence",
        examples=[*BUILT_IN_OBJECTIVES],
        description="Regulariser: confidence, pact as published, none for plain supervised "
        "fine-tuning; to compare with: mass, vocabulary (with --reference live), and first_tokens, "
        "which stands in place of the cross-entropy; or your own: path/to/file.py:function, or an "
        "entry point of pact_offline.objectives.",
    )
    kl_weight: float = Field(
        default_factory=_kl_weight,
        ge=0,
        description="Weight of the regulariser in the loss. Default: 1.25 with confidence, else 1.",
    )
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
        True, description="Safety tokens count by their weights, or all of them alike."
    )
    gate: bool = Field(
        True,
        description="pact: mix the response-only context in by the gate, or read the full one.",
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
    betas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 2.0, 2.0, 2.0, 2.0, 0.1),
        min_length=1,
        description="first_tokens: beta of each response step, how much it is held; the last one "
        "is of all steps that follow.",
    )


def without_blanks(names: tuple[str, ...]) -> tuple[str, ...]:
    stripped = tuple(name.strip() for name in names)
    if not all(stripped):
        raise ValueError(f"expected names, found an empty one in {','.join(names)!r}")
    return stripped


class LoraSettings(Settings):
    """What is trained of the policy."""

    method: Literal["lora", "full"] = Field("lora", description="Train an adapter or all weights.")
    lora_rank: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: float = Field(32, gt=0, description="LoRA alpha.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="LoRA dropout.")
    lora_modules: tuple[str, ...] = Field(
        ("auto",),
        min_length=1,
        description="Modules that get an adapter, by the ends of their names. auto: q_proj and "
        "v_proj, or where attention has none what it has in their place; all-linear: every linear "
        "module and the experts, but no router and not the LM head.",
    )
    lora_first_layer: int = Field(
        0, ge=0, description="Layers before this one get none; nothing is propagated through them."
    )
    lora_rslora: bool = Field(
        False, description="Scale by the rank's square root (rank-stabilised LoRA)."
    )
    lora_dora: bool = Field(False, description="Learn magnitude and direction apart (DoRA).")
    lora_init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default",
        description="First values, of peft's kinds that leave the model's own weights as they are.",
    )

    _without_blanks = field_validator("lora_modules")(without_blanks)


class FinetuneSettings(ObjectiveSettings, RowSettings, LoraSettings):
    """How the policy is trained.

    Defaults are the published settings, but for the objective and what is held and rehearsed, which
    docs/study.md measures; `--objective pact` gives the published ones.
    """

    reference: Literal["cache", "live"] = Field(
        "cache",
        description="Where targets come from: the cache, or the reference model kept in memory and "
        "run twice for every batch, as the published script does (slow; for proof).",
    )
    refused_rows: Literal["learn", "hold", "drop"] = Field(
        default_factory=_refused_rows,
        description="Answers that the reference would have refused, by its cached confidence: "
        "learn them, hold the policy to the reference there and learn nothing, or leave them out. "
        "Default: hold with confidence and a cache, else learn.",
    )
    refused_above: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The reference would have refused an answer where its weighted safety tokens "
        "have more than this probability together at step 0.",
    )
    rehearsal_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Share of the rows of a batch that are rehearsed, where --rehearsal is given; "
        "they come on top of --batch-size. 0: none.",
    )
    rehearsal_weight: float | None = Field(
        None,
        gt=0,
        description="How often a rehearsed step counts in the objective. Default: as often as rows "
        "of the task have more steps than rehearsed ones, and at least once.",
    )
    gap_warns: float | None = Field(
        None,
        gt=0,
        description="Warn where the confidence gap of held and rehearsed steps, as a mean over the "
        "last 20 optimizer steps, is above this; 0 to 2.",
    )
    gap_stops: float | None = Field(
        None, gt=0, description="End the training there, with exit code 2 and no adapter."
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
    dtype: ComputeDtype = Field(
        default_factory=default_dtype, description=f"Compute dtype{DTYPE_DEFAULT}"
    )
    load_in: Quantised | None = Field(
        None,
        description="Hold the policy's weights in so many bits, under its adapter (QLoRA), with "
        "bitsandbytes.",
    )
    attention: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field("auto", description="Attention kernel; auto: what suits the model and device.")
    row_order: Literal["by_length", "random", "as_given"] = Field(
        "by_length", description="by_length: shuffled, with rows of like length in a batch."
    )
    seed: int = Field(42, ge=0, description="Seed of weights, order and dropout.")
    save_steps: int = Field(
        0,
        ge=0,
        description="Write a checkpoint every so many optimizer steps; after a kill, the same "
        "command goes on from the last. 0: none.",
    )
    evaluate_steps: int = Field(
        0,
        ge=0,
        description="Let the policy answer prompts every so many optimizer steps, before the first "
        "and after the last: how refusals go while it trains. 0: never.",
    )
    evaluate_prompts: int = Field(
        20, ge=1, description="How many prompts of each set are answered then, from the first."
    )
    evaluate_tokens: int = Field(64, ge=1, description="Longest answer then, in tokens.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    pass_tokens: int | None = Field(
        None,
        ge=1,
        description="A batch of more tokens, with padding, takes several forward and backward "
        "passes, to the same gradient. Default: 1024 on a CPU, to suit its caches; else no limit.",
    )
    packing: bool = Field(
        False,
        description="Put the rows of a pass one after the other, with no padding; each still sees "
        "itself alone. On a GPU a third less memory; on a CPU less time where rows are rehearsed. "
        "Goes with --row-order random.",
    )
    compile: bool = Field(
        False,
        description="Compile the layers first: half a minute, then 1.4 times as fast on a CPU; "
        "needs a C++ compiler there.",
    )
    liger: bool = Field(
        False,
        description="On a GPU, take Liger's kernels for norms and gates, where liger-kernel is "
        "installed and knows the model's family; the loss stays as it is.",
    )
    report_to: tuple[str, ...] = Field(
        (),
        description="Also log every step with these: tensorboard (into tensorboard/NAME beside the "
        "output), wandb, or any other that transformers' Trainer knows and that is installed.",
    )

    _without_blanks_too = field_validator("report_to")(without_blanks)


class SafeLoraSettings(Settings):
    """Which modules of an adapter Safe LoRA projects."""

    threshold: float = Field(
        0.5,
        ge=-1,
        le=1,
        description="Project modules whose update is at most so similar (cosine) to its projection "
        "onto what alignment has changed.",
    )
    modules: int | None = Field(
        None, ge=1, description="Project so many modules, the least similar ones, instead."
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

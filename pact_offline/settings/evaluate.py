"""The settings of `evaluate`: how answers are made and judged."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pact_offline.machine import default_dtype
from pact_offline.settings.stages import DTYPE_DEFAULT, ChatSettings, Dtype, without_blanks

GuardFormat = Literal["auto", "llama-guard", "shieldgemma", "granite-guardian", "wildguard"]

# Known without importing what they name.
BUILT_IN_JUDGE = "phrases"
BUILT_IN_RUBRIC = "rubric"
TASK_SCORES = (
    "exact", "contains", "regex:PATTERN", "last_number", "choice", "choice_norm", "rouge_l",
)  # fmt: skip


class EvaluateSettings(ChatSettings):
    """How answers are made and judged."""

    max_new_tokens: int = Field(512, ge=1, description="Longest answer, in tokens.")
    backend: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="What makes the answers. auto: on a GPU vLLM, where it is installed and runs "
        "the model with its adapter; else transformers.",
    )
    batch_size: int = Field(32, ge=1, description="Prompts per batch (transformers).")
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="vLLM's share of the device's memory; by default vLLM's own on a GPU, and what "
        "answers need on a CPU.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one model (vLLM).")
    dtype: Dtype = Field(default_factory=default_dtype, description=f"Compute dtype{DTYPE_DEFAULT}")
    drift_steps: int = Field(
        12, ge=1, description="Response steps over which confidences are compared."
    )
    judge: str = Field(
        BUILT_IN_JUDGE,
        description="What a refusal is: phrases (in five languages), or your own: "
        "path/to/file.py:function, or an entry point of pact_offline.judges.",
    )
    rates: tuple[str, ...] = Field(
        (),
        description="Your own rates to count: path/to/file.py:function, or entry points of "
        "pact_offline.rates.",
    )
    task_scores: dict[str, str] = Field(
        {},
        description="How the answers to a set of task prompts are scored, by its name (task for "
        f"--task), as task=last_number: {', '.join(TASK_SCORES)}. Default: exact. docs/utility.md "
        "says what each is.",
    )
    lm_eval: tuple[str, ...] = Field(
        (),
        description="Tasks of EleutherAI's lm-eval that the model is also measured on, by name, as "
        "gsm8k,sst2; needs pact-offline[lm-eval].",
    )
    lm_eval_include: str | None = Field(
        None, description="Folder with lm-eval tasks of your own, as YAML."
    )
    lm_eval_limit: int | None = Field(
        None, ge=1, description="At most so many prompts of each lm-eval task. Default: all."
    )
    lm_eval_chat: bool = Field(
        False,
        description="Put lm-eval's prompts through the chat template; by default as bare text.",
    )
    guard: str | None = Field(
        None,
        description="Guard model that also judges the answers to prompts that are to be refused.",
    )
    guard_format: GuardFormat = Field(
        "auto",
        description="How the guard model is asked: auto (by its name and template), llama-guard, "
        "shieldgemma, granite-guardian or wildguard.",
    )
    endpoint: str | None = Field(
        None,
        description="URL of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1, whose "
        "model also judges the answers to prompts that are to be refused; its key stands in the "
        "environment, as PACT_OFFLINE_API_KEY.",
    )
    endpoint_model: str | None = Field(None, description="Name of the judge's model there.")
    endpoint_prompt: str = Field(
        BUILT_IN_RUBRIC,
        description="What it is asked: rubric (in the form of StrongREJECT's), or a YAML file of "
        "that form.",
    )
    prefill: tuple[int, ...] = Field(
        (),
        description="Ask prompts that are to be refused once more, with the answer begun in "
        "compliance: so many tokens of it; 1,5,20 is three more times.",
    )
    attack_system: str | None = Field(
        None,
        description="Ask prompts that are to be refused once more, with this system message in "
        "front.",
    )

    _without_blanks = field_validator("lm_eval")(without_blanks)

    @field_validator("task_scores")
    @classmethod
    def _known_scores(cls, scores: dict[str, str]) -> dict[str, str]:
        for name, score in scores.items():
            kind, _, pattern = score.partition(":")
            known = "regex:PATTERN" if kind == "regex" and pattern else score
            if known not in TASK_SCORES or score == "regex:PATTERN":
                raise ValueError(
                    f"{name}: expected one of {', '.join(TASK_SCORES)}, found {score!r:.60}"
                )
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{name}: expected a regular expression, found {pattern!r:.60}: {error}"
                ) from None
        return scores

    @field_validator("endpoint")
    @classmethod
    def _of_http(cls, url: str | None) -> str | None:
        if url is not None and not _is_http(url):
            raise ValueError(f"expected a URL as http://HOST:PORT/v1, found {url!r:.200}")
        if url is not None and "@" in urlsplit(url).netloc:  # it would stand in metrics.json
            raise ValueError("expected a URL without a password, found one; give it as a key")
        return url

    @model_validator(mode="after")
    def _whole_endpoint(self) -> EvaluateSettings:
        if self.endpoint is not None and not self.endpoint_model:
            raise ValueError(
                "endpoint_model: expected the judge's name at the endpoint, found none"
            )
        for key, default in (("endpoint_model", None), ("endpoint_prompt", BUILT_IN_RUBRIC)):
            if self.endpoint is None and getattr(self, key) != default:
                raise ValueError(f"endpoint: expected the URL that {key} is meant for, found none")
        return self


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if re.fullmatch(r"[\d.]+", host):
            ip_address(host)
        return (
            parts.scheme in ("http", "https")
            and re.fullmatch(r"[!-~]+", url) is not None
            and re.fullmatch(r"[\w.:-]+", host) is not None
            and parts.port != 0
        )
    except ValueError:  # of an address or a port that is none
        return False

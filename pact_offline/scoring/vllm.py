"""Scoring with vLLM."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.config import ScoreSettings
from pact_offline.conversations import Context
from pact_offline.errors import ModelError, ScoringError
from pact_offline.hub import first_line
from pact_offline.scoring.base import Scored
from pact_offline.scoring.vllm_plugin import PREFIX

_REQUESTS_AT_ONCE = 512
_SEQUENCES_AT_ONCE = 128


def prepare_environment() -> None:
    """What has to be set before vLLM is imported: quiet, all cores, no usage reports."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VllmScorer:
    """Runs vLLM's pooling engine with a model class that returns log-confidences.

    Prefix caching stays off: it can bring stale or missing rows (vLLM #42019).
    """

    def __init__(
        self, model: Path, safety_ids: Sequence[int], longest: int, settings: ScoreSettings
    ) -> None:
        """Start the engine.

        Raises:
            ModelError: vLLM does not know the architecture, or did not start.
        """
        prepare_environment()
        import vllm

        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        architecture = _architecture(model)
        if architecture not in vllm.ModelRegistry.get_supported_archs():
            raise ModelError(
                f"{model}: expected an architecture that vLLM runs, found {architecture}; use "
                "--backend transformers"
            )
        self._ids = len(safety_ids)
        try:
            self._llm = vllm.LLM(
                model=str(model),
                runner="pooling",
                hf_overrides={
                    "architectures": [f"{PREFIX}{architecture}"],
                    "pact_safety_ids": list(safety_ids),
                },
                pooler_config=vllm.config.PoolerConfig(task="token_classify"),
                dtype=settings.dtype,
                max_model_len=longest,
                max_num_batched_tokens=max(settings.batch_tokens, _SEQUENCES_AT_ONCE),
                max_num_seqs=_SEQUENCES_AT_ONCE,
                enable_chunked_prefill=True,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                tensor_parallel_size=settings.tensor_parallel_size,
                enable_prefix_caching=False,
                enforce_eager=True,
                trust_remote_code=False,
                load_format="safetensors",
                disable_log_stats=True,
            )
        except Exception as error:
            raise ModelError(f"{model}: vLLM did not start: {first_line(error)}") from error

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].ids), reverse=True)
        for first in range(0, len(order), _REQUESTS_AT_ONCE):
            batch = order[first : first + _REQUESTS_AT_ONCE]
            outputs = self._encode([contexts[i] for i in batch])
            if len(outputs) != len(batch):
                raise ScoringError(f"vLLM: expected {len(batch)} results, found {len(outputs)}")
            for index, output in zip(batch, outputs, strict=True):
                yield Scored(index, self._values(contexts[index], output))

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _encode(self, contexts: Sequence[Context]) -> list[Any]:
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": context.ids.tolist()} for context in contexts]
        params = [
            PoolingParams(
                task="token_classify",
                use_activation=False,
                extra_kwargs={"pact_first_row": context.response_start - 1},
            )
            for context in contexts
        ]
        try:
            return list(
                self._llm.encode(
                    prompts, pooling_params=params, pooling_task="token_classify", use_tqdm=False
                )
            )
        except Exception as error:
            raise ScoringError(f"vLLM stopped: {first_line(error)}") from error

    def _values(self, context: Context, output: Any) -> np.ndarray:
        expected = (context.steps, self._ids)
        data = getattr(getattr(output, "outputs", None), "data", None)
        shape = None if data is None else tuple(data.shape)
        if data is None or shape != expected:
            raise ScoringError(
                f"vLLM: context {context.key}: expected log-confidences {list(expected)}, "
                f"found {list(shape) if shape else 'none'}"
            )
        return np.asarray(data.float().cpu().numpy(), dtype=np.float32)


def _architecture(model: Path) -> str:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise ModelError(
            f"{model / 'config.json'}: architectures: expected a name, found none"
        ) from None

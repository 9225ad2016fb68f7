"""Scoring with vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pact_offline.errors import ModelError, PactError, ScoringError
from pact_offline.models.batches import batches
from pact_offline.models.load import require_compiler
from pact_offline.models.vllm_engine import (
    cache_for,
    engine_config,
    engine_options,
    known_architecture,
    prepare_environment,
    reason,
    refusal,
    require_same_values,
    start_engine,
)
from pact_offline.rows.contexts import Context
from pact_offline.scoring.scorer import Scored
from pact_offline.scoring.vllm_ways import Official, Plugin, takes_rows_of_ids
from pact_offline.settings.stages import ScoreSettings

_PASSES_AT_ONCE = 4  # forward passes between two signs of progress


class VllmScorer:
    """Runs the reference in vLLM, the official way where this vLLM has it, else as our own class.

    The official way is `prompt_logprob_token_ids`, which needs vLLM's V2 model runner (a GPU with
    Triton) and room for two more tokens than the longest context. Elsewhere, as on a CPU, the
    model runs as a class of ours in vLLM's pooling engine. Both give the same values.

    Prefix caching stays off: it can bring stale or missing rows (vLLM #42019).

    Attributes:
        how: which way it is, in words.
    """

    def __init__(
        self, model: Path, safety_ids: Sequence[int], longest: int, settings: ScoreSettings
    ) -> None:
        """Start the engine, and score one token: some models are refused only then.

        Raises:
            UnsupportedModelError: vLLM does not know the architecture, or refuses the model.
            ModelError: no architecture is named, or a context is longer than the model's positions.
        """
        prepare_environment(settings.tensor_parallel_size)
        import torch
        import vllm
        from vllm.triton_utils import HAS_TRITON

        if settings.compile:
            require_compiler()
        architecture = known_architecture(model)
        self._tokens_at_once = _PASSES_AT_ONCE * settings.batch_tokens
        self._set_num_threads = torch.set_num_threads
        options = engine_options(
            model,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            tensor_parallel_size=settings.tensor_parallel_size,
            eager=not settings.compile,
        )
        try:
            self._way: Official | Plugin = Official(safety_ids)
            is_there = HAS_TRITON and takes_rows_of_ids(vllm.SamplingParams)
            config = engine_config(options) if is_there else None
            if (
                config is None
                or not config.use_v2_model_runner
                or config.model_config.max_model_len < longest + self._way.extra_tokens
            ):
                self._way = Plugin(safety_ids, architecture)
                config = engine_config({**options, **self._way.options()})
            require_same_values(model, config)
            positions = config.model_config.max_model_len
            if positions < longest:
                raise ModelError(
                    f"{model}: expected contexts of at most {positions} tokens, the model's "
                    f"positions, found one of {longest}; lower --max-tokens"
                )
            self.how = self._way.how
            options["max_model_len"] = longest + self._way.extra_tokens
            options |= _memory(config, longest, settings) | self._way.options()
            self._llm = start_engine(options)
            first = Context("full", np.asarray([*safety_ids[:1]] * 2, dtype=np.int32), ((1, 2),))
            self._way.run(self._llm, [first])
        except Exception as error:
            self.close()
            if isinstance(error, PactError):
                raise
            raise refusal(model, error) from error

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].ids), reverse=True)
        sizes = [(len(context.fed), 0) for context in contexts]
        for batch in batches(order, sizes, self._tokens_at_once, padded=False):
            try:
                found = self._way.run(self._llm, [contexts[i] for i in batch])
            except Exception as error:
                raise ScoringError(f"vLLM stopped: {reason(error)}") from error
            if len(found) != len(batch):
                raise ScoringError(f"vLLM: expected {len(batch)} results, found {len(found)}")
            for index, values in zip(batch, found, strict=True):
                expected = (contexts[index].steps, self._way.ids + 1)
                if values is None or values.shape != expected:
                    shape = "none" if values is None else list(values.shape)
                    raise ScoringError(
                        f"vLLM: context {contexts[index].key}: expected log-confidences "
                        f"{list(expected)}, found {shape}"
                    )
                yield Scored(index, values[:, :-1], values[:, -1])

    def close(self) -> None:
        import torch

        engine = self.__dict__.pop("_llm", None)  # none where it did not start
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        torch.set_num_threads = self._set_num_threads  # vLLM's CPU worker switches it off


def _memory(config: Any, longest: int, settings: ScoreSettings) -> dict[str, Any]:
    """The share that was asked for; else a key-value cache of what scoring fills, and no more."""
    if settings.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return cache_for(config, 2 * settings.batch_tokens + longest)

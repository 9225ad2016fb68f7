"""Scoring with vLLM."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pact_offline.errors import (
    ModelError,
    PactError,
    ScoringError,
    UnsupportedModelError,
    first_line,
)
from pact_offline.models.batches import batches
from pact_offline.models.load import require_compiler
from pact_offline.rows.contexts import Context
from pact_offline.scoring.scorer import Scored
from pact_offline.scoring.vllm_ways import Official, Plugin, takes_rows_of_ids
from pact_offline.settings.stages import ScoreSettings

_PASSES_AT_ONCE = 4  # forward passes between two signs of progress
_SEQUENCES_AT_ONCE = 128
_GENERATED_AT_ONCE = 1 << 16  # tokens in the key-value cache while answers are made


def prepare_environment(tensor_parallel_size: int = 1) -> None:
    """What has to be set before vLLM is imported: quiet, all cores, no usage reports.

    A model on one device runs in this process, so that nothing outlives it. On a CPU that also
    starts three times sooner, and no second process takes cores from the model.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


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
        architecture = _known_architecture(model)
        self._tokens_at_once = _PASSES_AT_ONCE * settings.batch_tokens
        self._set_num_threads = torch.set_num_threads
        options = _options(model, settings)
        try:
            self._way: Official | Plugin = Official(safety_ids)
            is_there = HAS_TRITON and takes_rows_of_ids(vllm.SamplingParams)
            config = _engine_config(options) if is_there else None
            if (
                config is None
                or not config.use_v2_model_runner
                or config.model_config.max_model_len < longest + self._way.extra_tokens
            ):
                self._way = Plugin(safety_ids, architecture)
                config = _engine_config({**options, **self._way.options()})
            _require_same_values(model, config)
            positions = config.model_config.max_model_len
            if positions < longest:
                raise ModelError(
                    f"{model}: expected contexts of at most {positions} tokens, the model's "
                    f"positions, found one of {longest}; lower --max-tokens"
                )
            self.how = self._way.how
            options["max_model_len"] = longest + self._way.extra_tokens
            options |= _memory(config, longest, settings) | self._way.options()
            self._llm = vllm.LLM(**options)
            first = Context("full", np.asarray([*safety_ids[:1]] * 2, dtype=np.int32), ((1, 2),))
            self._way.run(self._llm, [first])
        except Exception as error:
            self.close()
            if isinstance(error, PactError):
                raise
            raise _refusal(model, error) from error

    def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].ids), reverse=True)
        sizes = [(len(context.fed), 0) for context in contexts]
        for batch in batches(order, sizes, self._tokens_at_once, padded=False):
            try:
                found = self._way.run(self._llm, [contexts[i] for i in batch])
            except Exception as error:
                raise ScoringError(f"vLLM stopped: {_reason(error)}") from error
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


def _known_architecture(model: Path) -> str:
    """The model's architecture.

    Raises:
        UnsupportedModelError: vLLM does not know it.
        ModelError: none is named.
    """
    import vllm

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    architecture = _architecture(model)
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        raise UnsupportedModelError(
            f"{model}: expected an architecture that vLLM runs, found {architecture}; use "
            "--backend transformers"
        )
    return architecture


def _options(model: Path, settings: ScoreSettings) -> dict[str, Any]:
    """An engine's options, whatever it is to do."""
    return {
        "model": str(model),
        "dtype": settings.dtype,
        "max_num_batched_tokens": max(settings.batch_tokens, _SEQUENCES_AT_ONCE),
        "max_num_seqs": _SEQUENCES_AT_ONCE,
        "enable_chunked_prefill": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": False,
        "enforce_eager": not settings.compile,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def greedy_answers(
    model: Path,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    length: int,
    settings: ScoreSettings,
    progress: Callable[[int], object],
) -> list[list[int]]:
    """The model's own answers, without what ends them.

    Args:
        model: directory of the model.
        prompts: token ids of each.
        ends: ids that end an answer.
        length: most tokens of an answer.
        settings: dtype and memory.
        progress: called with the number of prompts done.

    Raises:
        UnsupportedModelError: vLLM refuses the model.
    """
    prepare_environment(settings.tensor_parallel_size)
    import torch
    import vllm

    _known_architecture(model)
    set_num_threads = torch.set_num_threads
    longest = max(map(len, prompts)) + length
    options = {**_options(model, settings), "max_model_len": longest}
    llm = None
    try:
        held = min(len(prompts), _SEQUENCES_AT_ONCE) * longest
        config = _engine_config(options)
        _require_same_values(model, config)
        options |= _memory(config, min(held, _GENERATED_AT_ONCE), settings)
        llm = vllm.LLM(**options)
        params = vllm.SamplingParams(
            temperature=0, max_tokens=length, stop_token_ids=[*ends], detokenize=False
        )
        answers = []
        for first in range(0, len(prompts), _SEQUENCES_AT_ONCE):
            some = [{"prompt_token_ids": [*ids]} for ids in prompts[first:][:_SEQUENCES_AT_ONCE]]
            for output in llm.generate(some, params, use_tqdm=False):
                ids = [*output.outputs[0].token_ids]
                stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
                answers.append(ids[:stop])
            progress(len(some))
    except Exception as error:
        if isinstance(error, PactError):
            raise
        raise _refusal(model, error) from error
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        torch.set_num_threads = set_num_threads
    return answers


def _engine_config(options: dict[str, Any]) -> Any:
    """What vLLM makes of its options."""
    from vllm import EngineArgs

    return EngineArgs(**options).create_engine_config()


def _require_same_values(model: Path, config: Any) -> None:
    """Refuse what was seen to give other values in vLLM than in transformers.

    Raises:
        UnsupportedModelError: with the reason.
    """
    from vllm.triton_utils import HAS_TRITON

    if config.model_config.use_mla and not HAS_TRITON:
        raise UnsupportedModelError(
            f"{model}: on a CPU vLLM's latent attention (MLA) gives other values than "
            "transformers; use --backend transformers"
        )


def _memory(config: Any, longest: int, settings: ScoreSettings) -> dict[str, Any]:
    """The share that was asked for; else a key-value cache of what scoring fills, and no more."""
    if settings.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": settings.gpu_memory_utilization}
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    per_token = 2 * heads * model.get_head_size() * model.dtype.itemsize
    # Every short context takes a whole block. With less, vLLM would run fewer of them at once.
    blocks = _SEQUENCES_AT_ONCE * (config.cache_config.block_size or 16)
    tokens = 2 * settings.batch_tokens + longest + blocks
    # vLLM wants the share to be free even where it does not use it.
    return {"kv_cache_memory_bytes": per_token * tokens, "gpu_memory_utilization": 0.01}


def _refusal(model: Path, error: BaseException) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model}: vLLM does not run this model here: {_reason(error)}; use --backend transformers"
    )


def _reason(error: BaseException) -> str:
    """What the engine itself says; pydantic's first line only counts its errors."""
    if isinstance(error, ValidationError):
        inner = error.errors()[0]
        return first_line(inner.get("ctx", {}).get("error") or ValueError(inner["msg"]))
    return first_line(error)


def _architecture(model: Path) -> str:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise ModelError(
            f"{model / 'config.json'}: architectures: expected a name, found none"
        ) from None

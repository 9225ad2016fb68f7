"""Greedy answers by vLLM: one engine for a model and for LoRA adapters on it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pact_offline.errors import PactError, UnsupportedModelError
from pact_offline.models.vllm_engine import (
    SEQUENCES_AT_ONCE,
    cache_for,
    engine_config,
    engine_options,
    known_architecture,
    prepare_environment,
    refusal,
    require_same_values,
    start_engine,
)

_BATCH_TOKENS = 4096
_HELD_AT_ONCE = 1 << 16  # tokens in the key-value cache of a CPU
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


class VllmAnswers:
    """An engine that answers prompts until it is closed."""

    def __init__(
        self,
        model: Path,
        *,
        longest: int,
        prompts: int,
        dtype: str,
        batch_tokens: int = _BATCH_TOKENS,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        rank: int = 0,
    ) -> None:
        """Start the engine.

        Args:
            model: directory of the model.
            longest: tokens of the longest prompt with its answer.
            prompts: how many are asked at once, at most.
            dtype: it computes in.
            batch_tokens: most tokens of a forward pass.
            tensor_parallel_size: GPUs that share the model.
            gpu_memory_utilization: vLLM's share of the device's memory; None: its own default on a
                GPU, what answers fill on a CPU.
            rank: highest of the adapters to come; 0: none will.

        Raises:
            UnsupportedModelError: vLLM refuses the model.
        """
        prepare_environment(tensor_parallel_size)
        import torch

        known_architecture(model)
        self._model = model
        self._adapters: list[Path] = []
        self._asked = 0
        self._threads = torch.set_num_threads, torch.get_num_threads()
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._llm: Any = None
        is_on_cpu = not torch.cuda.is_available()
        options = engine_options(
            model,
            dtype=dtype,
            batch_tokens=batch_tokens,
            tensor_parallel_size=tensor_parallel_size,
            eager=is_on_cpu,
        )
        options["max_model_len"] = longest
        try:
            if rank:
                options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(rank)}
            config = engine_config(options)
            require_same_values(model, config)
            if gpu_memory_utilization is not None:
                options["gpu_memory_utilization"] = gpu_memory_utilization
            elif is_on_cpu:
                held = min(prompts, SEQUENCES_AT_ONCE) * longest
                options |= cache_for(config, 2 * batch_tokens + min(held, _HELD_AT_ONCE))
            self._llm = start_engine(options)
        except Exception as error:
            self.close()
            raise self._told(error) from error

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        length: int,
        adapter: Path | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """The number of a prompt and its answer, without what ends it, as they come.

        Args:
            prompts: token ids of each.
            ends: ids that end an answer.
            length: most tokens of an answer.
            adapter: directory of a LoRA adapter on the model.

        Raises:
            UnsupportedModelError: vLLM stops, which is its end, or refuses the adapter, or uses
                none of its modules.
        """
        from vllm import SamplingParams

        if not prompts:
            return
        try:
            request = self._with_adapter(adapter, prompts[0]) if adapter else None
        except Exception as error:
            raise self._told(error) from error
        try:
            params = SamplingParams(
                temperature=0,
                max_tokens=length,
                stop_token_ids=[*ends],
                detokenize=False,
                repetition_penalty=_repetition_penalty(self._model),
            )
            engine, numbers = self._llm.llm_engine, {}
            for number, ids in enumerate(prompts):
                numbers[str(self._asked)] = number
                prompt = {"prompt_token_ids": [*ids]}
                engine.add_request(str(self._asked), prompt, params, lora_request=request)
                self._asked += 1
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        ids = [*output.outputs[0].token_ids]
                        stop = next((at for at, one in enumerate(ids) if one in ends), len(ids))
                        yield numbers.pop(output.request_id), ids[:stop]
        except Exception as error:
            self.close()
            raise self._told(error) from error

    def _with_adapter(self, adapter: Path, prompt: Sequence[int]) -> Any:
        """A request for an adapter that changes what the model says of a prompt.

        vLLM may load an adapter and use none of its modules (vLLM #39369).
        """
        import torch
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        if adapter not in self._adapters:
            self._adapters.append(adapter)
        number = self._adapters.index(adapter) + 1
        request = LoRARequest(f"adapter-{number}", number, str(adapter.resolve()))
        # With a request in it, an engine that cannot load an adapter never ends.
        self._llm.llm_engine.add_lora(request)
        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0, detokenize=False
        )
        # Of two tokens nothing is worth compiling, and torch cannot at a path with a space.
        with torch.compiler.set_stance("force_eager"):
            found = [
                self._llm.generate(
                    {"prompt_token_ids": [*prompt]}, params, lora_request=lora, use_tqdm=False
                )[0]
                for lora in (None, request)
            ]
        plain, adapted = [(one.prompt_logprobs, one.outputs[0].logprobs) for one in found]
        if plain == adapted and _changes_something(adapter):
            raise UnsupportedModelError(
                f"{adapter}: vLLM uses none of the adapter's modules; use --backend transformers"
            )
        return request

    def _told(self, error: Exception) -> PactError:
        return error if isinstance(error, PactError) else refusal(self._model, error)

    def close(self) -> None:
        """Give back the memory, and the cores and threads that vLLM's CPU worker takes."""
        import torch

        engine, self._llm = self._llm, None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        torch.set_num_threads, threads = self._threads
        torch.set_num_threads(threads)
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)

    def __enter__(self) -> VllmAnswers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _room_for(rank: int) -> int:
    """The least that vLLM can hold of at least a rank.

    Raises:
        UnsupportedModelError: it is above all of them.
    """
    for room in _RANKS:
        if rank <= room:
            return room
    raise UnsupportedModelError(
        f"expected adapters of rank {_RANKS[-1]} at most, found {rank}; use --backend transformers"
    )


def _repetition_penalty(model: Path) -> float:
    """What the model's own generation config asks for, as `generate` heeds it.

    Raises:
        ModelError: it is no number above 0.
    """
    from transformers import GenerationConfig

    from pact_offline.models.generate import repetition_penalty

    try:
        found = GenerationConfig.from_pretrained(model, trust_remote_code=False)
    except OSError:  # older models say it in config.json, where transformers looks too
        found = GenerationConfig.from_pretrained(
            model, config_file_name="config.json", _from_model_config=True, trust_remote_code=False
        )
    return repetition_penalty(found, str(model))


def _changes_something(adapter: Path) -> bool:
    """Whether any of its weights that begin as 0 is another."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as weights:
        names = [name for name in list(weights.keys()) if "lora_B" in name]
        return any(bool(weights.get_tensor(name).any()) for name in names)

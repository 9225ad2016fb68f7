"""The two ways to have vLLM score given ids: its own, and a model class of ours."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from pact_offline.rows.contexts import Context
from pact_offline.scoring.vllm_plugin import PREFIX

_LABELS_AT_ONCE = 512  # tokens of a response whose own probabilities one request asks for


def takes_rows_of_ids(sampling_params: type) -> bool:
    """Whether a vLLM scores given ids in the form that we ask for: an array of ids a row, and where
    the rows begin.

    Others were proposed: no such field, and a flat list of ids for every row (vLLM #54335).
    """
    fields = inspect.signature(sampling_params).parameters
    if not {"prompt_logprob_token_ids", "prompt_logprob_start"} <= set(fields):
        return False
    kind = str(fields["prompt_logprob_token_ids"].annotation)
    return "ndarray" in kind or "list[list" in kind.lower()


class Official:
    """vLLM's own scoring of given ids."""

    how = "prompt_logprob_token_ids"
    extra_tokens = 1

    def __init__(self, safety_ids: Sequence[int]) -> None:
        self._safety_ids = np.asarray(safety_ids, dtype=np.int32)
        self.ids = len(safety_ids)

    def options(self) -> dict[str, Any]:
        return {"max_logprobs": self.ids + _LABELS_AT_ONCE}

    def run(self, llm: Any, contexts: Sequence[Context]) -> list[np.ndarray | None]:
        found: list[list[np.ndarray | None]] = [[] for _ in contexts]
        asked = [(i, part) for i, context in enumerate(contexts) for part in _parts(context)]
        outputs = self._generate(llm, [(contexts[i], part) for i, part in asked])
        for (i, part), output in zip(asked, outputs, strict=True):
            values = output.prompt_token_id_logprobs
            found[i].append(None if values is None else self._picked(contexts[i], part, values))
        return [
            None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
            for parts in found
        ]

    def _generate(self, llm: Any, asked: Sequence[tuple[Context, np.ndarray]]) -> Any:
        from vllm import SamplingParams

        # A row scores what follows a token of the prompt, but never what follows its last one. The
        # last token of a context is fed too, then; vLLM has to generate one more, unread.
        prompts = [{"prompt_token_ids": context.ids.tolist()} for context, _ in asked]
        params = []
        for context, part in asked:
            ids = self._ids_of(context, part)
            rows = len(context.ids) - int(part[0])
            params.append(
                SamplingParams(
                    max_tokens=1,
                    detokenize=False,
                    prompt_logprob_token_ids=np.tile(ids, (rows, 1)),
                    prompt_logprob_start=int(part[0]) - 1,
                )
            )
        return llm.generate(prompts, params, use_tqdm=False)

    def _ids_of(self, context: Context, part: np.ndarray) -> np.ndarray:
        labels = np.unique(context.ids[part])
        others = labels[~np.isin(labels, self._safety_ids)]
        return np.asarray(np.concatenate([self._safety_ids, others]), dtype=np.int32)

    def _picked(self, context: Context, part: np.ndarray, values: Any) -> np.ndarray:
        """Of every row's values, those of the steps: the safety ids, then the label."""
        ids = self._ids_of(context, part)
        order = np.argsort(ids, kind="stable")
        columns = order[np.searchsorted(ids, context.ids[part], sorter=order)]
        rows = np.asarray(values, dtype=np.float32)[part - int(part[0])]
        label = rows[np.arange(len(part)), columns]
        return np.concatenate([rows[:, : self.ids], label[:, None]], axis=1)


def _parts(context: Context) -> list[np.ndarray]:
    """The steps of a context, in parts of at most so many distinct labels."""
    positions = context.positions
    return [
        positions[first : first + _LABELS_AT_ONCE]
        for first in range(0, len(positions), _LABELS_AT_ONCE)
    ]


class Plugin:
    """Our model class in the pooling engine."""

    how = "a pooling class of pact-offline"
    extra_tokens = 0

    def __init__(self, safety_ids: Sequence[int], architecture: str) -> None:
        from vllm import ModelRegistry

        from pact_offline.scoring import vllm_model

        name = f"{PREFIX}{architecture}"
        # The plugin has named it; the class itself spares vLLM a process that looks at it (15 s).
        ModelRegistry.register_model(name, getattr(vllm_model, architecture))
        self._overrides = {"architectures": [name], vllm_model.SAFETY_IDS: list(safety_ids)}
        self.ids = len(safety_ids)

    def options(self) -> dict[str, Any]:
        from vllm.config import PoolerConfig

        return {
            "runner": "pooling",
            "pooler_config": PoolerConfig(task="token_classify"),
            "hf_overrides": self._overrides,
        }

    def run(self, llm: Any, contexts: Sequence[Context]) -> list[np.ndarray | None]:
        from vllm import PoolingParams

        from pact_offline.scoring.vllm_model import LABELS, ROWS

        prompts = [{"prompt_token_ids": context.fed.tolist()} for context in contexts]
        params = [
            PoolingParams(
                task="token_classify",
                use_activation=False,
                extra_kwargs={
                    ROWS: (context.positions - 1).tolist(),
                    LABELS: context.labels.tolist(),
                },
            )
            for context in contexts
        ]
        outputs = llm.encode(
            prompts, pooling_params=params, pooling_task="token_classify", use_tqdm=False
        )
        found = [getattr(output.outputs, "data", None) for output in outputs]
        return [None if values is None else values.float().cpu().numpy() for values in found]

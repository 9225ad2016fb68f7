"""A vLLM model that returns log-confidences at response steps instead of generating.

It runs inside vLLM's worker processes. Each class here is vLLM's own class of an architecture with
a pooler that applies the model's LM head (with its soft cap and scale) to the response rows only,
and keeps the log-softmax at the safety ids: nothing of vocabulary size leaves the worker.

Attributes of this module are made on first use: `vllm_model.LlamaForCausalLM` is the scoring class
of vLLM's `LlamaForCausalLM`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Set
from typing import Any

import torch
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.pool.metadata import PoolingMetadata

from pact_offline.models.log_confidences import log_probabilities_at, log_probabilities_of

SAFETY_IDS = "pact_safety_ids"  # key in the model's config
# Keys in a request's pooling parameters: rows of its hidden states, and the token after each.
ROWS, LABELS = "pact_rows", "pact_labels"
_ROWS_AT_ONCE = 1024  # bounds the logits in memory to this many vocabularies


class LogConfidencePooler(Pooler):  # type: ignore[misc]
    """Hidden states in, fp32 log-confidences [response steps, safety ids + 1] out, a request.

    The last column is of the token that follows. A prompt may arrive in chunks; the rows of each
    chunk are scored as they come.
    """

    def __init__(
        self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], safety_ids: list[int]
    ) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._safety_ids = safety_ids

    def get_supported_tasks(self) -> Set[Any]:
        return {"token_classify"}

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        seen = cursor.seq_lens_cpu.tolist()
        wanted: list[int] = []
        labels: list[int] = []
        counts: list[int] = []
        offset = 0
        for params, count, end in zip(
            pooling_metadata.pooling_params, scheduled, seen, strict=True
        ):
            # vLLM warms up with requests that carry no rows: score all of theirs.
            extra = params.extra_kwargs or {}
            rows = extra.get(ROWS, range(end - count, end))
            first, last = bisect_left(rows, end - count), bisect_left(rows, end)
            wanted.extend(offset + row - (end - count) for row in rows[first:last])
            labels.extend(extra.get(LABELS, [0] * end)[first:last])
            counts.append(last - first)
            offset += count
        device = hidden_states.device
        rows = hidden_states[torch.tensor(wanted, dtype=torch.long, device=device)]
        following = torch.tensor(labels, dtype=torch.long, device=device)
        parts = torch.split(self._log_confidences(rows, following), counts)
        outputs: list[torch.Tensor | None] = []
        for state, part, finished in zip(
            pooling_metadata.pooling_states, parts, cursor.get_finished_mask(), strict=True
        ):
            state.hidden_states_cache.append(part)
            outputs.append(torch.cat(state.hidden_states_cache) if finished else None)
            if finished:
                state.clean()
        return outputs

    def _log_confidences(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(self._safety_ids, dtype=torch.long, device=rows.device)
        pieces = [rows.new_zeros((0, len(ids) + 1), dtype=torch.float32)]
        for chunk, following in zip(
            torch.split(rows, _ROWS_AT_ONCE), torch.split(labels, _ROWS_AT_ONCE), strict=True
        ):
            logits = self._compute_logits(chunk)
            if logits is None:  # a tensor-parallel rank that does not gather
                shape = (len(chunk), len(ids) + 1)
                pieces.append(rows.new_zeros(shape, dtype=torch.float32))
                continue
            own = log_probabilities_of(logits, following).unsqueeze(-1)
            pieces.append(torch.cat((log_probabilities_at(logits, ids), own), dim=-1))
        return torch.cat(pieces)


def _scoring_class(architecture: str) -> type[Any]:
    base = ModelRegistry.models[architecture].load_model_cls()

    class LogConfidenceModel(base):  # type: ignore[misc, valid-type]
        is_pooling_model = True
        default_seq_pooling_type = "LAST"
        default_tok_pooling_type = "ALL"
        attn_type = "decoder"
        score_type = "bi-encoder"

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            ids = getattr(vllm_config.model_config.hf_config, SAFETY_IDS)
            self.pooler = LogConfidencePooler(self.compute_logits, list(ids))

    LogConfidenceModel.__name__ = LogConfidenceModel.__qualname__ = architecture
    return LogConfidenceModel


def __getattr__(name: str) -> Any:
    if name not in ModelRegistry.models:
        raise AttributeError(name)
    made = globals()[name] = _scoring_class(name)
    return made

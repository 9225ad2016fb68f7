"""What flash attention computes, in plain torch by its published interface, so that a CPU can say
whether transformers is told of padding and of packed rows in the way that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of ``[batch, tokens, heads, size]``; queries are the last of the keys."""
    assert dropout_p == 0
    queries, keys = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    before, after = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if before >= 0:
        hidden |= behind > before
    if after >= 0:
        hidden |= -behind > after
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """The same of sequences that stand one after the other: ``[tokens, heads, size]``."""
    ends = [zip(c.tolist(), c.tolist()[1:], strict=False) for c in (cu_seqlens_q, cu_seqlens_k)]
    found = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], dropout_p, softmax_scale, causal,
                        window_size, softcap, deterministic)[0]
        for (a, b), (c, d) in zip(*ends, strict=True)
    ]  # fmt: skip
    return torch.cat(found)


def plain_varlen_attn(called: list[str]) -> Any:
    """The same by the interface of torch's own; it adds to `called`."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
        max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert cu_seq_q.dtype == torch.int32
        assert max_q == max_k == cu_seq_q.diff().max()
        called.append("varlen_attn")
        return flash_attn_varlen_func(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale,
            window_size=window_size,
        )  # fmt: skip

    return varlen_attn


@contextmanager
def plain_flash_attention() -> Iterator[list[str]]:
    """Let transformers take it for flash attention 2 and 3; yields which functions it called."""
    called: list[str] = []

    def told(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            called.append(function.__name__)
            return function(*args, **kwargs)

        return call

    utils = modeling_flash_attention_utils
    functions = (told(flash_attn_func), told(flash_attn_varlen_func), None)
    given = (*functions, utils._pad_input, utils._unpad_input)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: given)
        patch.setattr(utils, "_loaded_implementation", None)
        patch.setattr(PreTrainedModel, "_flash_attn_import_error", lambda *args, **kwargs: None)
        yield called

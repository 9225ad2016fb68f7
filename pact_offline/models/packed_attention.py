"""Attention for packed rows on a GPU, by torch's own flash attention of variable lengths."""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pact_offline.models.load import has_soft_cap

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn

NAME = "packed"
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256  # that the kernel takes


class _Rows(NamedTuple):
    """Rows that are packed into one: where each begins and the last ends, int32 [rows + 1]."""

    ends: Tensor
    longest: int


_rows_by_positions: Any = WeakTensorKeyDictionary()
_masks_by_ends: Any = WeakTensorKeyDictionary()


def runs_packed(model: Any) -> bool:
    """Whether a model's attention may be `packed_attention`.

    It is where torch has the kernel, and where the family's attention needs nothing that the kernel
    lacks: sinks, which come without sdpa; a soft cap; chunks, which come without flash attention.
    """
    if model.device.type != "cuda" or varlen_attn is None:
        return False
    if not _takes(varlen_attn, "window_size"):  # torch before 2.11
        return False
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    is_plain = getattr(model.config, "is_causal", True) and not has_soft_cap(model.config)
    return bool(is_plain and model._supports_flash_attn and model._supports_sdpa)


@cache
def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What sdpa computes; of rows that are packed into one each attends to itself alone.

    Args:
        module: the attention layer.
        query: [rows, heads, queries, size].
        key, value: [rows, key-value heads, tokens, size].
        attention_mask: of `sdpa_mask`, or None: queries see all before them, in their own row.
        dropout: of the attention weights; any is left to sdpa.
        scaling: factor on the scores; None: size ** -0.5.
        sliding_window: tokens that a query sees at most, itself among them; None: all.
        position_ids: int64 [rows, tokens], or None: of packed rows, they begin anew in each.
        others: what models pass to some other implementation.

    Returns:
        [rows, queries, heads, size], and None in place of weights.
    """
    if attention_mask is not None or query.shape[0] > 1 or query.shape[2] < key.shape[2]:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, others)
    rows = _rows(position_ids, query)
    size, kind = key.shape[-1], query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings of fp32 weights leave fp32
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (one.to(dtype) for one in (query, key, value))
    fits = size == value.shape[-1] <= _LARGEST_HEAD and size % 8 == 0 and query.dtype in _DTYPES
    if dropout or not fits:
        mask = _mask(rows, sliding_window)
        return _sdpa(module, query, key, value, mask, dropout, scaling, others)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = _varlen(query, key, value, rows, scaling, window)
    return output[None], None


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
    )
    return found


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: _Rows,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Of [1, heads, tokens, size] each; [tokens, heads, size]."""
    says_shared = query.shape[1] != key.shape[1] and _takes(varlen_attn, "enable_gqa")  # torch 2.12
    output: Tensor = varlen_attn(
        *(x[0].transpose(0, 1).contiguous() for x in (query, key, value)),
        rows.ends,
        rows.ends,
        rows.longest,
        rows.longest,
        scale=scaling,
        window_size=window,
        **({"enable_gqa": True} if says_shared else {}),
    )
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rows(positions: Tensor | None, query: Tensor) -> _Rows:
    """The rows that positions tell of; one where they tell of none.

    They are looked up once a pass, not in every layer: a GPU is waited for there.
    """
    tokens = query.shape[2]
    if positions is None or positions.numel() != tokens:
        return _Rows(torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens)
    known: _Rows | None = _rows_by_positions.get(positions)
    if known is None:
        starts = (positions.flatten().diff() != 1).nonzero().flatten() + 1
        ends = torch.cat((starts.new_zeros(1), starts, starts.new_full((1,), tokens))).int()
        known = _rows_by_positions[positions] = _Rows(ends, int(ends.diff().max()))
    return known


def _mask(rows: _Rows, sliding_window: int | None) -> Tensor:
    """What each of the packed tokens sees, bool [1, 1, tokens, tokens]; made once a pass."""
    known: dict[int | None, Tensor] = _masks_by_ends.setdefault(rows.ends, {})
    if sliding_window in known:
        return known[sliding_window]
    sizes = rows.ends.diff()
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    at = torch.arange(len(row), device=row.device)
    behind = at[:, None] - at
    sees = (behind >= 0) & (row[:, None] == row)
    if sliding_window is not None:
        sees &= behind < sliding_window
    known[sliding_window] = sees[None, None]
    return known[sliding_window]


def _no_mask_of_packed_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """No mask for one row without padding, whose positions and window tell all; else that of sdpa.

    `use_vmap` comes with what a family adds to a causal mask.
    """
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not use_vmap:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **others,
    )
    return mask


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask_of_packed_rows)

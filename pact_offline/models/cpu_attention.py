"""Attention for short rows on a CPU, as an implementation that transformers can be told to use."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "grouped"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' eager attention computes, without its copies.

    Query heads that share a key and value head go through one product, so neither is repeated; a
    backward pass keeps the attention weights once, in the compute dtype, not in fp32 too; and of
    rows that are packed into one each attends to itself alone (but not compiled, as every batch
    has other rows).

    Args:
        module: the attention layer.
        query: [rows, heads, queries, size].
        key, value: [rows, key-value heads, tokens, size].
        attention_mask: what is added to the scores, [rows, 1, queries, tokens], or None.
        scaling: factor on the scores; None: size ** -0.5.
        dropout: of the attention weights, in training.
        softcap: bound of the scores (Gemma-2), or None.
        others: what models pass to some other implementation; a position bias is left to sdpa.

    Returns:
        [rows, queries, heads, size], and the attention weights [rows, heads, queries, tokens]; of
        packed rows None.
    """
    if others.get("position_bias") is not None:
        others |= {"scaling": scaling, "dropout": dropout}
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return found
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    sizes = None if torch.compiler.is_compiling() else _packed_sizes(attention_mask)
    if attention_mask is None or sizes is None:
        return _attend(query, key, value, attention_mask, dropout, softcap, module.training)
    ends = [0, *accumulate(sizes)]
    masks = [attention_mask[:, :, a:b, a:b] for a, b in pairwise(ends)]
    apart = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), masks, strict=True)
    outputs = [_attend(q, k, v, m, dropout, softcap, module.training)[0] for q, k, v, m in apart]
    return torch.cat(outputs, dim=1), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    softcap: float | None,
    train: bool,
) -> tuple[Tensor, Tensor]:
    rows, heads, queries, size = query.shape
    shared, tokens = key.shape[1], key.shape[2]
    scores = query.reshape(rows, shared, -1, size) @ key.transpose(2, 3)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        by_head = scores.view(rows, shared, -1, queries, tokens)
        scores = (by_head + mask[:, :, None]).view(scores.shape)
    weights = torch.softmax(scores, dim=-1)  # the kernel itself computes in fp32
    weights = torch.dropout(weights, dropout, train=train)
    output = (weights @ value).view(rows, heads, queries, -1).transpose(1, 2).contiguous()
    return output, weights.view(rows, heads, queries, tokens)


def _packed_sizes(mask: Tensor | None) -> list[int] | None:
    """Tokens of each of the rows that are packed into one, or None: they are not.

    A row starts where a token does not see the one before it, and no token sees another row.
    """
    if mask is None or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return None
    sees = mask[0, 0] > torch.finfo(mask.dtype).min / 2
    is_start = ~sees.diagonal(-1)
    row = torch.nn.functional.pad(is_start.cumsum(0), (1, 0))
    if not is_start.any() or (sees & (row[:, None] != row)).any():
        return None
    return [int(size) for size in row.bincount()]


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)

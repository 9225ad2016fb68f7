"""Attention for short rows on a CPU, as an implementation that transformers can be told to use."""

from __future__ import annotations

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

    Query heads that share a key and value head go through one product, so neither is repeated; and
    a backward pass keeps the attention weights once, in the compute dtype, not in fp32 too.

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
        [rows, queries, heads, size], and the attention weights [rows, heads, queries, tokens].
    """
    if others.get("position_bias") is not None:
        others |= {"scaling": scaling, "dropout": dropout}
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return found
    rows, heads, queries, size = query.shape
    shared, tokens = key.shape[1], key.shape[2]
    query = query * (size**-0.5 if scaling is None else scaling)
    scores = query.reshape(rows, shared, -1, size) @ key.transpose(2, 3)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        by_head = scores.view(rows, shared, -1, queries, tokens)
        scores = (by_head + attention_mask[:, :, None]).view(scores.shape)
    weights = torch.softmax(scores, dim=-1)  # the kernel itself computes in fp32
    weights = torch.dropout(weights, dropout, train=module.training)
    output = (weights @ value).view(rows, heads, queries, -1).transpose(1, 2).contiguous()
    return output, weights.view(rows, heads, queries, tokens)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)

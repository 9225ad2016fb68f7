"""Tiny chat models made on the spot: random weights, a BPE tokenizer trained on a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "I'm sorry, but I can't help with that request.",
    "Sure, here is how to do that. Billing, Shipping, Returns, Technical, Account, Sales.",
    "user assistant system User: Assistant: My parcel has not arrived and I want my money back.",
    "How do I write a letter to my neighbour about the noise at night? What is the best way?",
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=False),
    "llama-tied": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=True),
    "qwen": lambda **sizes: Qwen2Config(**sizes, tie_word_embeddings=False),
    "gemma": lambda **sizes: Gemma2Config(
        **sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=32, sliding_window=16
    ),
}


def make_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; other `extra` text, other vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, extra], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(
    path: Path, *, seed: int = 0, family: str = "llama", extra: str = "", **sizes: Any
) -> Path:
    """Save a random model and its tokenizer to `path`."""
    tokenizer = make_tokenizer(extra)
    set_seed(seed)
    config = FAMILIES[family](
        **{**SIZES, **sizes}, vocab_size=len(tokenizer), initializer_range=0.2
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

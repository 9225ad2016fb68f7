"""Tiny chat models made on the spot: random weights, a BPE tokenizer trained on a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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


def _of(kind: str, **more: Any) -> Any:
    """A configuration of transformers, by its model type."""
    return lambda **sizes: CONFIG_MAPPING[kind](**{**sizes, **more})


_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
}  # fmt: skip


_SECTIONS = {"mrope_section": [4, 6, 6]}  # of half a head


def _beside_vision(kind: str, more: dict[str, Any]) -> Any:
    """A model that also sees."""

    def make(**sizes: Any) -> Any:
        text = {key: value for key, value in {**sizes, **more}.items() if not key.startswith("bos")}
        tower = CONFIG_MAPPING[kind].sub_configs["vision_config"]
        if tower is AutoConfig:
            tower = CONFIG_MAPPING[f"{kind}_vision"]
        known = set(tower().to_dict())
        vision = {key: value for key, value in _VISION.items() if key in known}
        kept = {key: value for key, value in sizes.items() if key.endswith("_token_id")}
        return CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **kept)

    return make


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, Any] = {
    "llama": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=False),
    "llama-tied": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=True),
    "qwen": lambda **sizes: Qwen2Config(**sizes, tie_word_embeddings=False),
    "gemma": lambda **sizes: Gemma2Config(
        **sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=32, sliding_window=16
    ),
    "mistral": _of("mistral", sliding_window=16),
    "mixtral": _of("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3": _of("qwen3"),
    "qwen3-moe": _of("qwen3_moe", num_experts=4, **_EXPERTS),
    "qwen3.5": _of(
        "qwen3_5_text", num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=2,
    ),
    "gemma3": _of("gemma3_text", sliding_window=16, query_pre_attn_scalar=32),
    "gemma4": _of(
        "gemma4_text", sliding_window=16, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"], global_head_dim=32,
    ),
    "gemma4-vision": _beside_vision(
        "gemma4", {"hidden_size_per_layer_input": 8, "global_head_dim": 32, "sliding_window": 16}
    ),
    "qwen2.5-vl": _beside_vision(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **_SECTIONS}},
    ),
    "phi3": _of("phi3"),
    "gpt-oss": _of("gpt_oss", num_local_experts=4, num_experts_per_tok=2, rope_scaling=None),
    "glm4": _of("glm4"),
    "granite": _of("granite"),
    "deepseek-v3": _of(
        "deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid", n_routed_experts=4,
        n_group=1, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, head_dim=64,
        v_head_dim=128, num_key_value_heads=2, **_EXPERTS,  # vLLM has kernels for these alone
    ),
    "llama4": _of("llama4_text", num_local_experts=2, intermediate_size_mlp=96),
    "olmo2": _of("olmo2"),
    "nemotron-h": _of(
        "nemotron_h", num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=32, n_groups=1,
        ssm_state_size=8, n_routed_experts=4, moe_shared_expert_intermediate_size=32, **_EXPERTS,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    ),
    "gpt2": lambda **sizes: CONFIG_MAPPING["gpt2"](
        n_embd=64, n_layer=2, n_head=2, n_positions=1024,
        **{key: size for key, size in sizes.items() if key in _KEPT},
    ),
}  # fmt: skip
_KEPT = {"vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"}


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
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    model = kind.from_config(config).to(torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def states_of_head(model: Any) -> list[torch.Tensor]:
    """What a model's LM head will be given, behind every hook."""
    head, given = model.get_output_embeddings(), []
    own = head.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        given.append(states)
        return own(states)

    head.forward = forward
    return given


def logits_and_gradients(
    model: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of all weights, for the log-probability of one token at every position."""
    logits = model(ids).logits
    logits.log_softmax(-1)[..., 5].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients

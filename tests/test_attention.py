"""Attention for short rows: what eager attention computes, for every kind of head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_flash_attention import plain_flash_attention, plain_varlen_attn
from tiny import SIZES, make_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from pact_offline.errors import ModelError
from pact_offline.models import cpu_attention as attention
from pact_offline.models import packed_attention
from pact_offline.models.load import load_model
from pact_offline.models.log_confidences import aligned_batch, keeps_packed_rows_apart, packed_batch

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    (list(range(3, 4 + length)), [(start, length + 1)])
    for length, start in ((40, 30), (25, 24), (12, 3))
]


def logits_and_gradient(path: Path, kind: str, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    model = load_model(str(path), dtype, attention=kind)
    batch = aligned_batch(ROWS, 0)
    kept = model(**batch.inputs).logits.float()[:, batch.columns][batch.is_step]
    kept.pow(2).mean().backward()
    attend = model.model.layers[0].self_attn
    keys = getattr(attend, "k_proj", None) or attend.qkv_proj
    return kept.detach(), keys.weight.grad.float()


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("heads", [(2, 1), (4, 2), (2, 2)])
def test_grouped_attention_is_eager_attention(
    family: str, heads: tuple[int, int], tmp_path: Path
) -> None:
    """Shared heads or not, padding on both sides, a soft cap and a sliding window (gemma)."""
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    path = make_model(tmp_path / "m", family=family, **sizes)
    expected = logits_and_gradient(path, "eager")
    for found, wanted in zip(logits_and_gradient(path, "auto"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_fp32_as_eager_attention(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", num_attention_heads=4, num_key_value_heads=2)
    exact = logits_and_gradient(path, "eager")
    eager = logits_and_gradient(path, "eager", "bfloat16")
    ours = logits_and_gradient(path, "auto", "bfloat16")
    for wanted, theirs, found in zip(exact, eager, ours, strict=True):
        assert (found - wanted).pow(2).mean() < 1.5 * (theirs - wanted).pow(2).mean()


def test_generation_with_a_cache_gives_the_tokens_of_eager_attention(tmp_path: Path) -> None:
    path = str(make_model(tmp_path / "m"))
    rows = [([5, 6, 7, 8, 0], [(4, 5)]), ([9, 10, 0], [(2, 3)])]
    inputs = aligned_batch(rows, 0).inputs
    del inputs["position_ids"]
    eager, ours = (
        load_model(path, "float32", attention=kind).generate(**inputs, max_new_tokens=8)
        for kind in ("eager", "auto")
    )
    assert eager.tolist() == ours.tolist()


def test_attention_weights_are_dropped_in_training_alone() -> None:
    query = torch.randn(1, 2, 5, 8, generator=GENERATOR)
    layer: Any = torch.nn.Module()
    zero, _ = attention.grouped_attention(layer, query, query, query, None, dropout=1.0)
    assert zero.abs().max() == 0
    layer.eval()
    some, _ = attention.grouped_attention(layer, query, query, query, None, dropout=1.0)
    whole, _ = attention.grouped_attention(layer, query, query, query, None)
    assert torch.equal(some, whole)


def packed_mask(*sizes: int) -> Tensor:
    """What is added to the scores of rows that are packed into one: [1, 1, tokens, tokens]."""
    sees = torch.block_diag(*(torch.ones(size, size).tril() for size in sizes)).bool()
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo().min)[None, None]


def window(mask: Tensor) -> Tensor:
    """Of each token, no more than the three last ones."""
    near = torch.ones_like(mask).triu(-2).bool()
    return mask.masked_fill(~near, torch.finfo().min)


def one_sees_another_row(mask: Tensor) -> Tensor:
    mask[..., 12, 1] = 0
    return mask


@pytest.mark.parametrize(
    ("mask", "computed"),
    [
        (packed_mask(5, 1, 7), 5 * 5 + 1 + 7 * 7),
        (window(packed_mask(5, 1, 7)), 5 * 5 + 1 + 7 * 7),
        (packed_mask(13), 13 * 13),
        (one_sees_another_row(packed_mask(5, 1, 7)), 13 * 13),  # so it is no row of its own
    ],
)
def test_of_packed_rows_each_attends_to_itself(
    mask: Tensor, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax, seen = torch.softmax, []

    def counted(scores: Tensor, dim: int) -> Tensor:
        seen.append(scores.numel())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(attention.torch, "softmax", counted)
    query = torch.randn(1, 4, 13, 8, generator=GENERATOR, requires_grad=True)
    key, value = (torch.randn(1, 2, 13, 8, generator=GENERATOR) for _ in range(2))
    ours, _ = attention.grouped_attention(torch.nn.Module(), query, key, value, mask)
    assert sum(seen) == 4 * computed
    whole = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(ours, whole)
    (gradient,) = torch.autograd.grad(ours.square().sum(), query, retain_graph=True)
    (expected,) = torch.autograd.grad(whole.square().sum(), query)
    torch.testing.assert_close(gradient, expected)


def test_it_is_compiled_whole_for_packed_rows_of_any_lengths() -> None:
    compiled = torch.compile(
        attention.grouped_attention, backend="eager", fullgraph=True, dynamic=True
    )
    layer = torch.nn.Module()
    for mask in (packed_mask(5, 1, 7), packed_mask(4, 4), packed_mask(9)):
        query = torch.randn(1, 2, mask.shape[-1], 8, generator=GENERATOR)
        for dropout in (0.0, 1.0):
            out, _ = compiled(layer, query, query, query, mask, dropout=dropout)
            expected, _ = attention.grouped_attention(
                layer, query, query, query, mask, dropout=dropout
            )
            torch.testing.assert_close(out, expected)


def test_a_position_bias_is_left_to_sdpa() -> None:
    query = torch.randn(1, 2, 5, 8, generator=GENERATOR)
    layer: Any = torch.nn.Module()
    bias = torch.zeros(1, 2, 5, 5)
    bias[..., 1:] = -1e9  # every query sees the first token alone
    out, _ = attention.grouped_attention(layer, query, query, query, None, position_bias=bias)
    first = query[:, :, :1].expand_as(query).transpose(1, 2)
    torch.testing.assert_close(out, first)


@pytest.mark.parametrize(("attention", "expected"), [("auto", "eager"), ("eager", "eager")])
def test_a_model_that_sdpa_is_not_right_for_keeps_its_own(
    attention: str, expected: str, tmp_path: Path
) -> None:
    """Attention sinks, which no shared implementation on a CPU knows."""
    config = GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "float32", attention=attention)
    assert model.config._attn_implementation == expected


def test_a_family_without_sdpa_is_loaded_off_the_cpu_too(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "oss")
    meta = torch.device("meta")
    model = load_model(str(tmp_path / "oss"), "float32", device=meta)
    assert model.config._attn_implementation == "eager"
    model = load_model(str(make_model(tmp_path / "llama")), "float32", device=meta)
    assert model.config._attn_implementation == "sdpa"


def test_the_implementation_is_not_saved_with_the_model(tmp_path: Path) -> None:
    model = load_model(str(make_model(tmp_path / "m")), "float32")
    assert model.config._attn_implementation == attention.NAME
    model.save_pretrained(tmp_path / "saved")
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in ("llama", "gemma", "gemma3", "mistral", "mixtral", "phi3", "qwen3", "gpt2")
        for kind in ("auto", "eager", "sdpa")
        if (family, kind) != ("gemma", "sdpa")  # refused: scores are bounded
    ],
)
def test_packed_rows_see_themselves_alone(family: str, kind: str, tmp_path: Path) -> None:
    """Windows, soft caps, sinks and learnt positions: the logits of padded rows, to rounding."""
    rows = [
        ([5, 6, 7, 8, 0], [(2, 3), (4, 5)]),
        ([9, 10, 0], [(1, 3)]),
        ([*range(3, 40)], [(9, 37)]),
    ]
    model = load_model(str(make_model(tmp_path / "m", family=family)), "float32", attention=kind)
    assert keeps_packed_rows_apart(model)
    packed = packed_batch(rows)
    assert "attention_mask" not in packed.inputs
    together = model(**packed.inputs, logits_to_keep=packed.columns, use_cache=False).logits[0]
    apart = []
    for row in rows:
        alone = aligned_batch([row], 0)
        logits = model(**alone.inputs, logits_to_keep=alone.columns, use_cache=False).logits
        apart.append(logits[alone.is_step])
        labels = alone.labels[alone.is_step]
        assert labels.tolist() == [row[0][at] for span in row[1] for at in range(*span)]
    assert packed.is_step.all()
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt-oss", "qwen3.5", "llama", "gemma", "phi3", "mixtral"])
def test_a_model_that_sees_one_packed_row_in_the_next_is_known(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = load_model(str(make_model(tmp_path / "m", family=family)), dtype)
    assert keeps_packed_rows_apart(model) == (family not in ("gpt-oss", "qwen3.5"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 64}),
        ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32,
                       "mamba_d_state": 8, "mamba_n_groups": 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)  # fmt: skip
def test_a_model_that_carries_little_over_is_known_too(
    kind: str, sizes: dict[str, int], dtype: str
) -> None:
    """Less than what rounding in bfloat16 makes of other logits."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **sizes, "vocab_size": 400})
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    assert not keeps_packed_rows_apart(model)


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
def test_flex_attention_is_eager_attention(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    for found, wanted in zip(
        logits_of(path, "flex_attention"), logits_of(path, "eager"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def logits_of(path: Path, kind: str) -> Tensor:
    batch = aligned_batch(ROWS, 0)
    with torch.inference_mode():
        model = load_model(str(path), "float32", attention=kind)
        return model(**batch.inputs).logits[:, batch.columns][batch.is_step]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "family", ["llama", "gemma", "gemma3", "mistral", "mixtral", "phi3", "qwen3", "olmo2", "glm4"]
)
def test_flash_attention_is_told_of_padding_and_of_packed_rows(
    family: str, version: int, tmp_path: Path
) -> None:
    """Logits and gradient of eager attention, through flash attention's own interface."""
    path = make_model(tmp_path / "m", family=family)
    expected = logits_and_gradient(path, "eager")
    kind = f"flash_attention_{version}"
    with plain_flash_attention() as called:
        for found, wanted in zip(logits_and_gradient(path, kind), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert set(called) == {"flash_attn_varlen_func"}
        called.clear()
        model = load_model(str(path), "float32", attention=kind)
        assert keeps_packed_rows_apart(model)
        packed = packed_batch(ROWS)
        kept = model(**packed.inputs, use_cache=False).logits[0, packed.columns]
        torch.testing.assert_close(kept, expected[0], rtol=1e-4, atol=1e-5)
        assert "flash_attn_varlen_func" in called


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "mixtral", "qwen3", "gemma3", "gemma4", "phi3", "glm4", "granite", "olmo2",
     "gpt2", "deepseek-v3"],
)  # fmt: skip
def test_packed_attention_is_eager_attention(
    family: str, kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernel of variable lengths (here in plain torch), and where that cannot be."""
    path = str(make_model(tmp_path / "m", family=family))
    calls: list[str] = []
    if kernel:
        monkeypatch.setattr(packed_attention, "_DTYPES", (torch.float32,))
        monkeypatch.setattr(packed_attention, "varlen_attn", plain_varlen_attn(calls))
    found = []
    for kind in ("eager", packed_attention.NAME):
        model = load_model(path, "float32", attention="eager")
        model.set_attn_implementation(kind)
        assert keeps_packed_rows_apart(model)
        packed = packed_batch(ROWS)
        logits = model(**packed.inputs, use_cache=False).logits[0, packed.columns]
        logits.pow(2).mean().backward()
        weights = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.cat([weight.flatten() for weight in weights])))
        padded = aligned_batch(ROWS, 0)
        again = model(**padded.inputs, use_cache=False).logits[:, padded.columns][padded.is_step]
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    assert bool(calls) == (kernel and family != "deepseek-v3")  # its values are narrower
    for ours, eager in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_packed_attention_answers_prompts_too(tmp_path: Path) -> None:
    """A policy that is asked while it trains: a cache, and one row alone."""
    path = str(make_model(tmp_path / "m", family="mistral"))
    eager, ours = (load_model(path, "float32", attention="eager") for _ in range(2))
    ours.set_attn_implementation(packed_attention.NAME)
    for rows in ([([*range(3, 40), 0], [(37, 38)])], [([5, 6, 7, 0], [(3, 4)]), ROWS[0]]):
        inputs = aligned_batch(rows, 0).inputs
        del inputs["position_ids"]
        found = [m.generate(**inputs, max_new_tokens=8).tolist() for m in (eager, ours)]
        assert found[0] == found[1]


def test_scores_that_are_bounded_are_not_left_to_sdpa(tmp_path: Path) -> None:
    path = str(make_model(tmp_path / "m", family="gemma"))
    model = load_model(path, "float32", device=torch.device("meta"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="soft cap, which sdpa leaves out"):
        load_model(path, "float32", attention="sdpa")

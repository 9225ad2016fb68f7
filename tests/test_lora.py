"""Which modules get an adapter, and how it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import FAMILIES, SIZES, make_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pact_offline.errors import SettingError
from pact_offline.fine_tuned import FineTuned
from pact_offline.models.load import empty_model, load_model
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training.lora import check_lora_modules, lora_targets, with_adapter

VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def of_family(family: str, **options: Any) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """A tiny policy with its adapter; modules and parameters that it was to get."""
    config = FAMILIES[family](**{**SIZES, "vocab_size": 400})
    policy = AutoModelForCausalLM.from_config(config)
    settings = FinetuneSettings(lora_dropout=0, **options)
    targets = lora_targets(policy, family, settings)
    return with_adapter(policy, family, settings), targets.modules, targets.parameters


def adapted(policy: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in policy.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("phi3", {"qkv_proj"}),
        ("gpt2", {"c_attn"}),
        ("deepseek-v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}),
        ("qwen3.5", {"q_proj", "v_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"}),
        ("nemotron-h", {"q_proj", "v_proj"}),  # its layers' parts are all a "mixer"
    ],
)
def test_the_default_is_what_attention_reads_with(family: str, expected: set[str]) -> None:
    policy, modules, parameters = of_family(family)
    assert set(modules) == expected
    assert not parameters
    assert {name.rpartition(".")[2] for name in adapted(policy)} == expected
    layers = set(range(policy.config.num_hidden_layers))
    if family == "nemotron-h":
        layers = {policy.config.layer_types.index("full_attention")}
    assert {int(name.split(".")[2]) for name in adapted(policy)} == layers


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"])
def test_all_linear_has_experts_and_neither_routers_nor_the_head(family: str) -> None:
    policy, _, parameters = of_family(family, lora_modules=("all-linear",))
    assert set(parameters) == {"experts.gate_up_proj", "experts.down_proj"}
    names = adapted(policy)
    assert any("experts" in name for name in names)
    assert any("o_proj" in name for name in names)
    for name in names:
        assert not {"router", "gate", "lm_head"} & set(name.split("."))


@pytest.mark.parametrize(
    "kind",
    ["nemotron_h", "falcon_h1", "mamba", "mamba2", "falcon_mamba", "bamba", "granitemoehybrid"],
)
def test_all_linear_leaves_out_what_peft_adapts_in_no_model_of_a_type(
    kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[kind](num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    all_linear = FinetuneSettings(lora_modules=("all-linear",), lora_dropout=0)
    check_lora_modules(str(tmp_path), all_linear)
    assert f"no out_proj gets an adapter in a model of type {kind}" in caplog.text
    policy = empty_model(str(tmp_path))
    names = adapted(with_adapter(policy, kind, all_linear))
    assert {"in_proj"} <= {name.rpartition(".")[2] for name in names}
    assert not any("out_proj" in name for name in names)
    with pytest.raises(SettingError, match=r"--lora-modules: expected .* found 'out_proj'"):
        check_lora_modules(str(tmp_path), FinetuneSettings(lora_modules=("out_proj",)))


@pytest.mark.parametrize("modules", ["all-linear", "experts.down_proj"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lora-dropout", 0.05], "--lora-dropout: expected 0 for"),
        (["--lora-dora"], "--lora-dora: expected none for"),
        (["--lora-init", "orthogonal"], "--lora-init: expected default or gaussian for"),
    ],
)
def test_what_experts_cannot_have_is_refused_by_its_name(
    options: list[Any], expected: str, modules: str, tmp_path: Path, command: list[Any],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    command[command.index("--model") + 1] = make_model(tmp_path / "m", family="mixtral")
    line = fails(*command, "--lora-modules", modules, *options, "-o", tmp_path / "out")
    assert f"{expected} {modules}" in line


@pytest.mark.parametrize("name", ["experts.down_proj", "down_proj"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "nemotron-h"])
def test_experts_can_be_named(family: str, name: str) -> None:
    policy, _, parameters = of_family(family, lora_modules=(name,))
    assert parameters == (name,)
    ends = {tuple(place.split(".")[-2:]) for place in adapted(policy)}
    others = {end for end in ends if end[1] != "experts"}
    is_alone = name.startswith("experts") or family != "nemotron-h"  # which has dense ones too
    assert ends - others and bool(others) != is_alone


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_experts_before_the_first_layer_get_no_adapter(family: str) -> None:
    policy, _, _ = of_family(family, lora_modules=("all-linear",), lora_first_layer=1)
    names = adapted(policy)
    assert any("experts" in name for name in names)
    assert {name.split(".")[2] for name in names} == {"1"}


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "layers"), ("llama", "input_layernorm"), ("mixtral", "gate"), ("llama4", "router")],
)
def test_what_is_no_linear_module_is_refused_with_those_that_are(family: str, name: str) -> None:
    """peft names containers by their whole text, and adapts a router as a `weight`."""
    with pytest.raises(SettingError, match=rf"^--lora-modules: .* q_proj, .*; found '{name}'$"):
        of_family(family, lora_modules=("q_proj", name))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--lora-init", "orthogonal", "--lora-rank", 7],
            "--lora-rank: expected an even number for --lora-init orthogonal, found 7",
        ),
        (["--load-in", "8bit", "--lora-dora"], "--lora-dora: expected weights of"),
        (["--lora-modules", "gate_proj"], "that peft adapts, found Cannot convert PEFT target(s)"),
    ],
)
def test_what_peft_refuses_is_refused_before_weights_are_loaded(
    options: list[Any], expected: str, tmp_path: Path, command: list[Any],
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command[command.index("--model") + 1] = make_model(tmp_path / "m", family="deepseek-v3")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("pact_offline.training.lora.default_device", lambda: torch.device("cpu"))
    assert expected in fails(*command, *options, "-o", tmp_path / "out")


def test_dora_over_a_checkpoint_in_8_bits_is_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pact_offline.training.lora.default_device", lambda: torch.device("cpu"))
    in_eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    FAMILIES["llama"](**SIZES, quantization_config=in_eight).save_pretrained(tmp_path)
    check_lora_modules(str(tmp_path), FinetuneSettings())
    with pytest.raises(SettingError, match=r"^--lora-dora: expected weights of"):
        check_lora_modules(str(tmp_path), FinetuneSettings(lora_dora=True))


@pytest.mark.parametrize("modules", [("auto",), ("all-linear",), ("q_proj", "v_proj")])
def test_a_tower_that_sees_gets_no_adapter(modules: tuple[str, ...], tmp_path: Path) -> None:
    text = {key: value for key, value in SIZES.items() if not key.startswith("bos")}
    text |= {"vocab_size": 400, "hidden_size_per_layer_input": 8, "global_head_dim": 32}
    config = CONFIG_MAPPING["gemma4"](text_config=text, vision_config=VISION)
    policy = AutoModelForCausalLM.from_config(config)
    assert any("vision_tower" in name for name, _ in policy.named_modules())
    settings = FinetuneSettings(lora_modules=modules, lora_dropout=0)
    names = adapted(with_adapter(policy, "gemma4", settings))
    assert {name.split(".")[1] for name in names} == {"language_model"}


def test_a_model_that_only_is_loaded_as_one_that_sees_is_checked_too(tmp_path: Path) -> None:
    text = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = CONFIG_MAPPING["qwen2_5_vl"](text_config={**text, "vocab_size": 400})
    config.save_pretrained(tmp_path)
    check_lora_modules(str(tmp_path), FinetuneSettings())
    with pytest.raises(SettingError, match=r"\(down_proj, gate_proj, .*found 'qkv'"):
        check_lora_modules(str(tmp_path), FinetuneSettings(lora_modules=("qkv",)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_rslora": True}, {"use_rslora": True}),
        ({"lora_dora": True}, {"use_dora": True}),
        ({"lora_init": "gaussian"}, {"init_lora_weights": "gaussian"}),
        ({"lora_init": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
        ({"lora_rank": 4, "lora_alpha": 2}, {"r": 4, "lora_alpha": 2}),
    ],
)
def test_kinds_of_lora_reach_peft_and_begin_as_the_model(
    options: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = str(make_model(tmp_path / "m"))
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = load_model(model, "float32")(ids).logits
    policy = with_adapter(load_model(model, "float32"), model, FinetuneSettings(**options)).eval()
    config = policy.peft_config["default"]
    assert {key: getattr(config, key) for key in expected} == expected
    torch.testing.assert_close(policy(ids).logits, plain, rtol=1e-5, atol=1e-5)


def test_the_modules_that_get_an_adapter_are_shown(
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str]
) -> None:
    model = make_model(tmp_path / "m", family="mixtral")
    words = ["modules", "--model", model, "--lora-modules", "all-linear", "--lora-dropout", 0]
    found = json.loads(run(*words, "--json").stdout)
    assert {name: len(places) for name, places in found.items()} == {
        "k_proj": 2, "o_proj": 2, "q_proj": 2, "v_proj": 2,
        "experts.gate_up_proj": 2, "experts.down_proj": 2,
    }  # fmt: skip
    assert found["q_proj"][0] == "model.layers.0.self_attn.q_proj"
    assert "model.layers.0.self_attn.q_proj …" in run(*words).stdout
    assert "found 'w1'" in fails(*words[:3], "--lora-modules", "w1")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_embeddings_get_no_adapter_that_could_not_be_merged(
    name: str, tmp_path: Path, command: list[Any], run: Callable[..., Result],
    fails: Callable[..., str],
) -> None:  # fmt: skip
    """Merged, an adapter of one would change the other too."""
    model = make_model(tmp_path / "m", family="llama-tied")
    command[command.index("--model") + 1] = model
    del command[5:9]
    words = ["--objective", "none", "--lora-modules", f"q_proj,{name}", "-o", tmp_path / "out"]
    assert f"which are one weight, found '{name}'" in fails(*command, *words)

    policy = load_model(str(model), "float32")
    made = get_peft_model(policy, LoraConfig(target_modules=["q_proj", name], r=4))
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(7, 27)[None]
    tuned = FineTuned.read(tmp_path / "theirs").added_to(load_model(str(model), "float32"))
    torch.testing.assert_close(tuned(ids).logits, made.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    line = fails("score", "--model", f"{model}+{tmp_path / 'theirs'}", *command[3:5], "--cache",
                 tmp_path / "c", "-o", tmp_path / "t.json", "--safety-tokens", "x")  # fmt: skip
    assert "expected an adapter that can be added up, found one of embeddings" in line


def test_all_linear_tells_of_dense_modules_that_peft_gives_to_experts(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    sizes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = CONFIG_MAPPING["glm4_moe"](**SIZES, **sizes, vocab_size=400, moe_intermediate_size=32)
    config.save_pretrained(tmp_path)
    check_lora_modules(
        str(tmp_path), FinetuneSettings(lora_modules=("all-linear",), lora_dropout=0)
    )
    assert "in place of 6 linear modules with names like theirs, as model.layers.0" in caplog.text


def test_linear_modules_in_a_list_get_an_adapter_too(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma3n_text"](
        **SIZES, vocab_size=400, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=400, laurel_rank=8, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    settings = FinetuneSettings(lora_modules=("all-linear",), lora_dropout=0)
    check_lora_modules(str(tmp_path), settings)
    policy = with_adapter(empty_model(str(tmp_path)), "m", settings)
    assert any("altup_projections.0" in name for name in adapted(policy))

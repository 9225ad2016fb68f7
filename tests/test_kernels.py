"""Kernels other than a model's own: taken on a GPU where they keep loss and gradient, or refused.

No GPU is needed: the device is said to be one, and what stands for a kernel does what it is to do.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_flash_attention import plain_varlen_attn
from tiny import make_model

from pact_offline.errors import SettingError
from pact_offline.models import liger, packed_attention
from pact_offline.models.load import load_model
from pact_offline.rows.contexts import TokenizedExample
from pact_offline.rows.spans import Turn
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training import kernels
from pact_offline.training.policy import prepare_policy, prepare_to_pack

Change = Callable[[Any], None]


def each_layer(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """What changes the output of every layer of a policy."""

    def take(policy: Any) -> None:
        for layer in policy.get_base_model().model.layers:
            layer.register_forward_hook(lambda module, given, output: change(output))

    return take


class _DoublesTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def does_not_run(policy: Any) -> None:
    raise RuntimeError("no kernel image is available\nfor execution")


ROWS = [
    TokenizedExample(np.arange(3, 3 + length, dtype=np.int32), (Turn(start, start, start, length),))
    for start, length in ((4, 30), (20, 60))
]


@pytest.fixture
def settings() -> FinetuneSettings:
    return FinetuneSettings(dtype="float32", lora_dropout=0.5, compile=True)


@pytest.fixture
def policy(aligned: Path, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = prepare_policy(str(aligned), settings).train()
    monkeypatch.setattr(kernels, "default_device", lambda: torch.device("cuda"))
    return made


@pytest.mark.parametrize("packing", [False, True])
def test_kernels_that_keep_loss_and_gradient_are_taken(
    packing: bool, policy: Any, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a dropout of a half; and the policy is left as it was."""
    taken: list[Any] = []
    monkeypatch.setattr(kernels, "compile_layers", taken.append)
    before = policy.config._attn_implementation
    order = {"packing": packing, "row_order": "random"}
    kernels.take_kernels(policy, settings.model_copy(update=order), ROWS)
    assert taken == [policy]
    assert policy.config._attn_implementation == before
    assert all(module.training for module in policy.modules())
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (each_layer(lambda out: out * 1.5), "expected kernels that move logits by at most "),
        (each_layer(_DoublesTheGradient.apply), "expected kernels that move logits by at most "),
        (each_layer(lambda out: out * torch.nan), "found nan% and nan%; train without"),
        (does_not_run, "expected kernels that run here, found: no kernel image is available"),
    ],
)
def test_kernels_that_do_not_are_refused_in_a_line(
    change: Change, expected: str, dtype: Any, aligned: Path, settings: FinetuneSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = settings.model_copy(update={"dtype": dtype})
    policy = prepare_policy(str(aligned), settings).train()
    monkeypatch.setattr(kernels, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(kernels, "compile_layers", change)
    with pytest.raises(SettingError, match=r"^--compile: ") as found:
        kernels.take_kernels(policy, settings, ROWS)
    assert expected in str(found.value)


def test_a_kernel_that_moves_fp32_by_a_hundredth_is_refused(
    policy: Any, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compile_layers", each_layer(lambda out: out * 1.01))
    with pytest.raises(SettingError, match="expected kernels that move"):
        kernels.take_kernels(policy, settings, ROWS)


@pytest.mark.parametrize("layers", [2, 12])
def test_a_right_attention_is_taken_in_bfloat16(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far bfloat16 moves a deep model: as far as it moves the model's own attentions."""
    model = make_model(tmp_path / "deep", num_hidden_layers=layers)
    own = FinetuneSettings(dtype="bfloat16")
    policy = prepare_policy(str(model), own).train()
    chosen = policy.config._attn_implementation  # a third, of this project
    monkeypatch.setattr(kernels, "default_device", lambda: torch.device("cuda"))
    named = own.model_copy(update={"attention": "flex_attention"})
    kernels.take_kernels(policy, named, ROWS)
    assert policy.config._attn_implementation == chosen


def test_too_little_memory_is_not_the_kernels_fault(
    policy: Any, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills(policy: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(kernels, "compile_layers", fills)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.take_kernels(policy, settings, ROWS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral", "phi3"])
def test_ligers_kernels_are_one_models_alone(family: str, tmp_path: Path) -> None:
    """Its family's classes and functions stay, and so does the next model."""
    path = str(make_model(tmp_path / "m", family=family))
    model, other = load_model(path, "float32"), load_model(path, "float32")
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    liger.use_liger(model)
    assert {k: v for k, v in vars(module).items() if before.get(k) is not v} == {}
    assert any("liger_kernel" in method for method in _methods(model))
    assert _methods(load_model(path, "float32")) == _methods(other)


def _methods(model: Any) -> set[str]:
    return {f"{m.forward.__module__}.{m.forward.__qualname__}" for m in model.modules()}


INTERPRETED = ["llama", "qwen3", "gemma", "gemma3", "phi3", "olmo2", "glm4"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    command = [sys.executable, str(Path(__file__).with_name("interpreted_liger.py")), *INTERPRETED]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("family", INTERPRETED)
def test_ligers_kernels_keep_logits_and_gradients(
    family: str, interpreted: dict[str, dict[str, float]]
) -> None:
    """The real ones, in Triton's interpreter; that of mixture-of-experts models needs a GPU."""
    assert 0 < interpreted[family]["logits"] < 1e-4, "0 where no kernel ran"
    assert interpreted[family]["gradient"] < 1e-4


def test_ligers_kernels_are_refused_before_a_model_is_loaded(
    command: list[Any], aligned: Path, tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.training.policy.load_model", None)
    monkeypatch.setattr("pact_offline.models.load.default_device", lambda: torch.device("cpu"))
    line = fails(*command, "--liger", "-o", tmp_path / "out")
    assert "--liger: expected a GPU, found a CPU" in line
    monkeypatch.setattr("pact_offline.models.load.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    line = fails(*command, "--liger", "-o", tmp_path / "out")
    assert "expected an installed liger-kernel, found none; install pact-offline[liger]" in line


def test_too_little_memory_of_an_accelerator_is_one_line(
    command: list[Any], tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
        )

    monkeypatch.setattr("pact_offline.training.policy.load_model", load)
    line = fails(*command, "-o", tmp_path / "out")
    assert "found: CUDA out of memory. Tried to allocate 2.00 GiB; it needs less with" in line
    assert "--pass-tokens" in line
    assert not (tmp_path / "out").exists()


@functools.wraps(plain_varlen_attn([]))
def moves_all(*args: Any, **kwargs: Any) -> Any:
    return plain_varlen_attn([])(*args, **kwargs) * 1.2


def is_not_built(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("PyTorch was not compiled with flash attention")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (None, packed_attention.NAME),
        (lambda *args, **kwargs: args[2] * 0, "sdpa"),
        (moves_all, "sdpa"),
        (is_not_built, "sdpa"),
    ],
)
def test_packed_rows_take_torchs_kernel_or_go_by_a_mask(
    wrong: Any, expected: str, aligned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain torch in the kernel's place, as on a GPU; one that is wrong is not an error."""
    settings = FinetuneSettings(dtype="float32", lora_dropout=0, packing=True)
    made = prepare_policy(str(aligned), settings).train()
    made.get_base_model().set_attn_implementation("sdpa")
    monkeypatch.setattr("pact_offline.training.policy.runs_packed", lambda model: True)
    monkeypatch.setattr(kernels, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(packed_attention, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(packed_attention, "varlen_attn", wrong or plain_varlen_attn([]))
    prepare_to_pack(made, settings, "m")
    kernels.take_kernels(made, settings, ROWS)
    assert made.config._attn_implementation == expected


def test_in_fp32_weights_the_kernel_is_given_what_autocast_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr(packed_attention, "varlen_attn", plain_varlen_attn(called))
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for size, is_called in ((8, True), (12, False)):  # the kernel takes multiples of 8
        called.clear()
        query = torch.randn(1, 2, 5, size)
        whole, _ = packed_attention.packed_attention(
            torch.nn.Module(), query, query, query, None, position_ids=positions
        )
        assert not called
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = packed_attention.packed_attention(
                torch.nn.Module(), query, query, query, None, position_ids=positions
            )
        assert bool(called) == is_called
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), whole, rtol=0.05, atol=0.05)

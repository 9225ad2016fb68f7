"""Kernels other than a model's own: taken on a GPU where they keep loss and gradient, or refused.

No GPU is needed: the device is said to be one, and what stands for a kernel does what it is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_offline.errors import SettingError
from pact_offline.models import liger
from pact_offline.settings.stages import FinetuneSettings
from pact_offline.training import kernels
from pact_offline.training.policy import prepare_policy

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
    taken: list[Any] = []
    monkeypatch.setattr(kernels, "compile_layers", taken.append)
    order = {"packing": packing, "row_order": "random"}
    kernels.take_kernels(policy, settings.model_copy(update=order))
    assert taken == [policy]
    assert policy.training
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (each_layer(lambda out: out * 1.5), "keep the policy's loss and gradient, found others"),
        (each_layer(_DoublesTheGradient.apply), "keep the policy's loss and gradient, found"),
        (each_layer(lambda out: out * torch.nan), "keep the policy's loss and gradient, found"),
        (does_not_run, "expected kernels that run here, found: no kernel image is available"),
    ],
)
def test_kernels_that_do_not_are_refused_in_a_line(
    change: Change, expected: str, policy: Any, settings: FinetuneSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "compile_layers", change)
    with pytest.raises(SettingError, match=r"^--compile: ") as found:
        kernels.take_kernels(policy, settings)
    assert expected in str(found.value)


def test_an_attention_by_name_is_compared_with_the_models_own(
    policy: Any, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, known = policy.get_base_model(), []
    monkeypatch.setattr(inner, "set_attn_implementation", known.append)
    chosen = {"compile": False, "attention": "flex_attention"}
    kernels.take_kernels(policy, settings.model_copy(update=chosen))
    assert known == ["eager", "flex_attention"]


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

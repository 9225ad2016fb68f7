"""The LM head in chunks, by itself or inside the model: the same loss and gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pact_offline.models import lm_head as head_module
from pact_offline.models.lm_head import step_log_probabilities
from pact_offline.models.load import load_model
from pact_offline.settings.stages import ObjectiveSettings
from pact_offline.training.collator import ResponseCollator
from pact_offline.training.loss import batch_loss

IDS = torch.tensor([3, 5, 77])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25])


def make_batch() -> dict[str, torch.Tensor]:
    """Four rows with responses of 1 to 9 tokens; targets are the uniform confidences."""
    random = torch.Generator().manual_seed(0)
    rows = [(5, 9), (12, 1), (3, 4), (8, 6)]
    items = [
        {
            "input_ids": torch.randint(3, 300, (start + steps,), generator=random).tolist(),
            "response_start": start,
            "index": index,
        }
        for index, (start, steps) in enumerate(rows)
    ]
    batch = ResponseCollator(0)(items)
    return batch | {"target_full": torch.full((20, len(IDS)), -5.7)}


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    parts = batch_loss(
        model, make_batch(), IDS, WEIGHTS, ObjectiveSettings(objective="confidence", gate=False)
    )
    assert parts.steps == 20
    parts.loss.backward()
    return parts.loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_chunks_change_neither_loss_nor_gradients(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(make_model(tmp_path / "m", family=family)), "float32")
    if method == "lora":
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    head = model.get_output_embeddings()
    at_once = loss_and_gradients(model)
    assert head_module._is_known[head]
    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(head_module, "_LOGITS_AT_ONCE", 3 * head.weight.shape[0])
        hook = head.register_forward_hook(lambda m, given, out: sizes.append(len(given[0])))
        chunked = loss_and_gradients(model)
        hook.remove()
    assert max(sizes) == 4  # rows, of the model's own call, which gets no columns; chunks are of 3
    assert sizes.count(3) == 12  # six chunks, in the forward pass and again in the backward
    monkeypatch.setitem(head_module._is_known, head, False)
    whole = loss_and_gradients(model)
    assert_same(chunked, at_once)
    assert_same(whole, at_once)


@pytest.mark.parametrize("change", [lambda logits: logits * 2, lambda logits: logits.clamp(max=1)])
def test_a_head_with_an_unknown_treatment_runs_inside_the_model(
    change: Callable[[torch.Tensor], torch.Tensor], aligned: Path
) -> None:
    model = load_model(str(aligned), "float32")

    def treat(module: Any, given: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(treat)
    batch = make_batch()
    is_step = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][is_step]
    picked, safety = step_log_probabilities(model, batch, is_step, labels, IDS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    columns = batch["logits_to_keep"]
    expected = model(**inputs).logits[:, columns][is_step].log_softmax(-1)
    torch.testing.assert_close(picked, expected.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(safety, expected[:, IDS])


@pytest.fixture
def one_process() -> Iterator[Any]:
    """A mesh of this process alone: enough for weights that are whole only inside the model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_sharded_head_runs_inside_the_model(
    family: str, tmp_path: Path, one_process: Any
) -> None:
    path = str(make_model(tmp_path / "m", family=family))
    expected = loss_and_gradients(load_model(path, "float32"))
    model = load_model(path, "float32")
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    loss, gradients = loss_and_gradients(model)
    assert_same((loss, {name: g.full_tensor() for name, g in gradients.items()}), expected)

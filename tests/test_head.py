"""The LM head in chunks, by itself or inside the model: the same loss and gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import make_model, states_of_head
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pact_offline.errors import ModelError
from pact_offline.models import lm_head as head_module
from pact_offline.models.lm_head import step_log_probabilities
from pact_offline.models.load import load_model
from pact_offline.objectives.confidence import confidence
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
            "turns": [start, start, start, start + steps],
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


def test_a_head_is_compared_on_no_slice_of_states(tmp_path: Path) -> None:
    """Torch would copy it for every row of the batch on a CPU."""
    model = load_model(str(make_model(tmp_path / "m")), "float32")
    given = states_of_head(model)
    loss_and_gradients(model)
    assert [states.shape[:-1] for states in given] == [(4, 1), (4, 1), (20,)]
    assert all(states.is_contiguous() for states in given)


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
    places = is_step.flatten().nonzero().squeeze(1)
    found = step_log_probabilities(model, batch, places, labels, IDS, IDS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    columns = batch["logits_to_keep"]
    expected = model(**inputs).logits[:, columns][is_step].log_softmax(-1)
    torch.testing.assert_close(found.labels, expected.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(found.safety, expected[:, IDS])
    torch.testing.assert_close(found.rest, (1 - expected[:, IDS].exp().sum(-1)).log())


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


def closed_form(policy: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy) over some ids and the rest, from logits in float64; [steps]."""

    def classes(logits: torch.Tensor) -> torch.Tensor:
        logs = logits.double().log_softmax(-1)
        rest = logs.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((logs[:, ids], rest), -1)

    ours, theirs = classes(policy), classes(reference)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def test_confidence_has_its_gradient_however_sure_the_policy_is() -> None:
    random = torch.Generator().manual_seed(0)
    logits, reference = (torch.rand(2, 400, 300, generator=random) * 80 - 40).unbind()
    logits[:100, IDS] = 40  # it refuses for sure: 1e-9 and less are left for all other ids
    logits[:100].clamp_(min=-40).masked_fill_(logits[:100] < 40, -40)
    logits[100:200, IDS[1]] = 40
    reference[::2, IDS[0]] = 30
    logits.requires_grad_()
    found = head_module.log_probabilities(logits, torch.zeros(400, dtype=torch.long), IDS, IDS)
    full = reference.double().log_softmax(-1)[:, IDS].float()
    value = confidence(found.safety, full, None, WEIGHTS, torch.zeros(400), policy_rest=found.rest)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = closed_form(exact, reference, IDS)
    (right,) = torch.autograd.grad(expected.sum(), exact)
    assert (right[:200].abs().sum(-1) > 1e-3).float().mean() > 0.9
    torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mass", [0.3, 0.9])
def test_the_rest_is_what_the_other_ids_hold(mass: float) -> None:
    shares = torch.full((2, 50), (1 - mass) / 47)
    shares[:, [3, 5, 7]] = mass / 3
    logits = shares.log() + 4
    ids = torch.tensor([3, 5, 7])
    labels = torch.tensor([5, 9])
    found = head_module.log_probabilities(logits, labels, torch.tensor([7, 8]), ids)
    assert found.rest is not None
    torch.testing.assert_close(found.labels.exp(), shares[:, labels].diagonal())
    torch.testing.assert_close(found.safety.exp(), shares[:, 7:9])
    torch.testing.assert_close(found.rest.exp(), torch.full((2,), 1 - mass))


def test_a_policy_that_refuses_for_sure_is_pulled_back(aligned: Path) -> None:
    """Through the model and its head, as in training; the reference does not refuse."""
    model = load_model(str(aligned), "float32")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    with torch.no_grad():
        head.bias[IDS[0]] = 60
    batch = make_batch()
    settings = ObjectiveSettings(objective="confidence")
    parts = batch_loss(model, batch, IDS, WEIGHTS, settings)
    (pull,) = torch.autograd.grad(parts.loss - batch_loss(model, batch).loss, head.bias)
    assert pull[IDS[0]] > 0.9 * parts.steps


def test_a_model_that_heeds_no_logits_to_keep_is_refused(aligned: Path) -> None:
    """Its steps would be taken for others'."""
    model = load_model(str(aligned), "float32")
    own = model.forward
    model.forward = lambda **inputs: own(**{**inputs, "logits_to_keep": 0})
    with pytest.raises(ModelError, match=r"gives logits at the 9 places .* found 20"):
        batch_loss(model, make_batch(), IDS, WEIGHTS, ObjectiveSettings(objective="confidence"))

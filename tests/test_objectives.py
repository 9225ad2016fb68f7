from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from torch import Tensor

from pact_offline.config import ObjectiveSettings
from pact_offline.objectives import OBJECTIVES, confidence, count_to_mass, pact

CASES = sorted((REFERENCE / "objective").glob("*.npz"))


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def response_rows(case: dict[str, Tensor], policy: Tensor) -> tuple[Tensor, ...]:
    """Policy, full and response-only logits at the safety ids, and steps; one row a step."""
    ids, header = case["safety_token_ids"].long(), int(case["header_len"])
    parts = []
    for row, labels in enumerate(case["labels"]):
        at = (labels != -100).nonzero().flatten()
        steps = torch.arange(len(at))
        parts.append(
            (
                policy[row, at - 1][:, ids],
                case["reference_full_logits"][row, at - 1][:, ids],
                case["reference_response_only_logits"][row, header - 1 + steps][:, ids],
                steps,
            )
        )
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("shift", [False, True], ids=["logits", "log-confidences"])
def test_pact_equals_the_published_script(path: Path, shift: bool) -> None:
    case = load(path)
    logits = case["policy_logits"].requires_grad_()
    if shift:
        for name in ("reference_full_logits", "reference_response_only_logits"):
            case[name] = case[name].log_softmax(-1)
    policy, full, response_only, steps = response_rows(case, logits)
    weights = case["safety_token_weights"].clamp(min=0)
    loss = pact(policy, full, response_only, weights, steps).mean()
    loss.backward()
    torch.testing.assert_close(loss, case["kl"].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        logits.grad, case["kl_gradient_wrt_policy_logits"], rtol=0, atol=1e-5
    )


def test_the_gate_counts_the_entries_that_hold_the_mass() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]).log()
    assert count_to_mass(scores, 0.9).tolist() == [3, 1]


def random_case(steps: int = 7, ids: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, steps, 40, generator=generator) * 3
    policy, full, response_only = logits.log_softmax(-1)[:, :, :ids]
    weights = torch.rand(ids, generator=generator)
    weights[1] = 0
    return {
        "policy": policy,
        "full": full,
        "response_only": response_only,
        "weights": weights,
        "steps": torch.arange(steps),
    }


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
class TestEveryObjective:
    def test_gives_one_fp32_value_a_step(self, name: str) -> None:
        value = OBJECTIVES[name].per_step(*random_case().values(), ObjectiveSettings())
        assert value.shape == (7,)
        assert value.dtype == torch.float32

    def test_computes_bf16_input_in_fp32(self, name: str) -> None:
        case = random_case()
        case["policy"] = case["policy"].bfloat16()
        coarse = OBJECTIVES[name].per_step(*case.values(), ObjectiveSettings())
        case["policy"] = case["policy"].float()
        fine = OBJECTIVES[name].per_step(*case.values(), ObjectiveSettings())
        torch.testing.assert_close(coarse, fine, rtol=0, atol=0)

    def test_no_steps_give_a_zero_that_back_propagates(self, name: str) -> None:
        case = {
            key: value if key == "weights" else value[:0] for key, value in random_case().items()
        }
        policy = case["policy"] = case["policy"].clone().requires_grad_()
        value = OBJECTIVES[name].per_step(*case.values(), ObjectiveSettings()).sum()
        value.backward()
        assert value.item() == 0
        assert policy.grad is not None

    @pytest.mark.parametrize("weights", ["some", "none"])
    def test_extremes_stay_finite(self, name: str, weights: str) -> None:
        case = random_case()
        case["policy"] = torch.where(case["policy"] > -4, 0.0, -1e4).requires_grad_()
        case["full"][:, 0] = -torch.inf
        case["response_only"][:2] = -torch.inf
        if weights == "none":
            case["weights"] = torch.zeros(5)
        value = OBJECTIVES[name].per_step(*case.values(), ObjectiveSettings()).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(case["policy"].grad).all()

    def test_one_safety_token_is_enough(self, name: str) -> None:
        case = {k: v[..., :1] if k != "steps" else v for k, v in random_case().items()}
        value = OBJECTIVES[name].per_step(*case.values(), ObjectiveSettings())
        assert torch.isfinite(value).all()

    def test_order_of_steps_does_not_matter(self, name: str) -> None:
        case = random_case()
        order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
        mixed = {k: v if k == "weights" else v[order] for k, v in case.items()}
        settings = ObjectiveSettings()
        torch.testing.assert_close(
            OBJECTIVES[name].per_step(*mixed.values(), settings),
            OBJECTIVES[name].per_step(*case.values(), settings)[order],
        )


def test_pact_reads_shares_only() -> None:
    case = random_case()
    plain = pact(**case)
    for name in ("policy", "full", "response_only"):
        shifted = {**case, name: case[name] + torch.arange(7.0).unsqueeze(-1)}
        torch.testing.assert_close(pact(**shifted), plain)


def test_a_hard_window_ends_the_mix() -> None:
    case = random_case(steps=12)
    settings = ObjectiveSettings(window=4, tau=0)
    other = {**case, "response_only": case["response_only"] * 2}
    changed = pact(**case, settings=settings) != pact(**other, settings=settings)
    assert changed[:4].all()
    assert not changed[4:].any()


def test_confidence_is_zero_with_zero_gradient_at_the_reference() -> None:
    case = random_case()
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    case["policy"] = logits.log_softmax(-1)[:, :5]
    case["full"] = case["policy"].detach().clone()
    value = confidence(**case)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_confidence_is_a_divergence_of_weighted_ids_and_the_rest() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0])
    reference = torch.tensor([[0.5, 0.1, 0.1]])
    policy = torch.tensor([[0.2, 0.3, 0.4]])
    p, q = torch.tensor([0.5, 0.1, 0.4]), torch.tensor([0.2, 0.4, 0.4])
    value = confidence(policy.log(), reference.log(), None, weights, torch.zeros(1))
    torch.testing.assert_close(value, (p * (p / q).log()).sum().unsqueeze(0))

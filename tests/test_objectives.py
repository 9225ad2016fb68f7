import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from torch import Tensor

from pact_offline.errors import SettingError
from pact_offline.objectives.confidence import confidence, log_rest
from pact_offline.objectives.first_tokens import first_tokens
from pact_offline.objectives.inputs import finite
from pact_offline.objectives.mass import mass
from pact_offline.objectives.pact import count_to_mass, pact
from pact_offline.objectives.registry import (
    OBJECTIVES,
    kl_weight_at,
    objective_named,
    step_weights,
    weights_in_use,
)
from pact_offline.objectives.vocabulary import vocabulary
from pact_offline.settings.stages import BUILT_IN_OBJECTIVES, HOLD_NOTHING, ObjectiveSettings

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
class TestEveryObjective:
    """The contract. The dtype is the policy's; targets come from the cache in fp32."""

    def value(self, name: str, case: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        objective, extra = OBJECTIVES[name], {}
        case = {**case, "policy": case["policy"].to(dtype)}
        if objective.needs_labels:  # the first id stands for what is said
            extra = {"policy_label": case["policy"][:, 0], "reference_label": case["full"][:, 0]}
        if objective.needs_vocabulary:  # the ids and all the rest
            for key in ("policy", "full"):
                values = finite(case[key])
                case[key] = torch.cat((values, log_rest(values)), dim=1)
        return objective.per_step(*case.values(), ObjectiveSettings(), **extra)

    def test_gives_one_fp32_value_a_step(self, name: str, dtype: torch.dtype) -> None:
        value = self.value(name, random_case(), dtype)
        assert value.shape == (7,)
        assert value.dtype == torch.float32

    def test_computes_in_fp32_inside(self, name: str, dtype: torch.dtype) -> None:
        case = random_case()
        case["policy"] = case["policy"].to(dtype)
        fine = self.value(name, {**case, "policy": case["policy"].float()}, torch.float32)
        torch.testing.assert_close(self.value(name, case, dtype), fine, rtol=0, atol=0)

    def test_is_a_divergence(self, name: str, dtype: torch.dtype) -> None:
        assert (self.value(name, random_case(), dtype) > 0).all()

    def test_no_steps_give_a_zero_that_back_propagates(self, name: str, dtype: torch.dtype) -> None:
        case = {
            key: value if key == "weights" else value[:0] for key, value in random_case().items()
        }
        policy = case["policy"] = case["policy"].clone().requires_grad_()
        value = self.value(name, case, dtype).sum()
        value.backward()
        assert value.item() == 0
        assert policy.grad is not None

    @pytest.mark.parametrize("weights", ["some", "none"])
    @pytest.mark.parametrize("masked", ["one id", "all ids"])
    def test_extremes_stay_finite(
        self, name: str, dtype: torch.dtype, weights: str, masked: str
    ) -> None:
        """Logits of +-1e4, and vocabulary entries that the reference masks out."""
        case = random_case()
        logits = torch.where(case["policy"] > -4, 1e4, -1e4).requires_grad_()
        case["policy"] = torch.cat((logits, torch.zeros(7, 1)), 1).log_softmax(-1)[:, :-1]
        case["full"][:, 0 if masked == "one id" else slice(None)] = -torch.inf
        case["response_only"][:2] = -torch.inf
        if weights == "none":
            case["weights"] = torch.zeros(5)
        value = self.value(name, case, dtype).sum()
        value.backward()
        assert torch.isfinite(value)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()

    def test_one_safety_token_is_handled(self, name: str, dtype: torch.dtype) -> None:
        case = {k: v[..., :1] if k != "steps" else v for k, v in random_case().items()}
        assert torch.isfinite(self.value(name, case, dtype)).all()

    def test_order_of_steps_does_not_matter(self, name: str, dtype: torch.dtype) -> None:
        case = random_case()
        order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
        mixed = {k: v if k == "weights" else v[order] for k, v in case.items()}
        torch.testing.assert_close(
            self.value(name, mixed, dtype), self.value(name, case, dtype)[order]
        )

    def test_packed_responses_give_what_they_give_alone(
        self, name: str, dtype: torch.dtype
    ) -> None:
        one = random_case(steps=7)
        two = {**random_case(steps=4), "weights": one["weights"]}
        packed = {k: one[k] if k == "weights" else torch.cat((one[k], two[k])) for k in one}
        alone = [self.value(name, case, dtype) for case in (one, two)]
        torch.testing.assert_close(self.value(name, packed, dtype), torch.cat(alone))


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


def of_labels(
    betas: tuple[float, ...], gaps: list[float], steps: list[int]
) -> tuple[Tensor, Tensor]:
    """`first_tokens` where the policy's label is so much likelier, and its gradient."""
    label = torch.full((len(gaps),), -3.0)
    policy = (label + torch.tensor(gaps)).requires_grad_()
    nothing = torch.zeros(len(gaps), 0)
    value = first_tokens(
        nothing, nothing, None, torch.zeros(0), torch.tensor(steps),
        ObjectiveSettings(objective="first_tokens", betas=betas),
        policy_label=policy, reference_label=label,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value.sum(), policy)
    return value.detach(), gradient


def test_first_tokens_is_the_published_formula() -> None:
    """-(2 / beta) log sigmoid(beta * gap); beta 0.5, then 2 four times, then 0.1."""
    gaps, steps = [0.0, 1.0, -2.0, 3.0, 0.5, -1.0, 4.0, 1.0], [0, 1, 2, 3, 4, 5, 90, -1]
    betas = [0.5, 2, 2, 2, 2, 0.1, 0.1, 0.5]
    value, gradient = of_labels(ObjectiveSettings().betas, gaps, steps)
    logistic = [1 / (1 + math.exp(-beta * gap)) for beta, gap in zip(betas, gaps, strict=True)]
    by_hand = [-2 / b * math.log(share) for b, share in zip(betas, logistic, strict=True)]
    torch.testing.assert_close(value, torch.tensor(by_hand))
    # The released script's: the cross-entropy's gradient, -1, times 2 (1 - sigmoid(beta * gap)).
    torch.testing.assert_close(gradient, torch.tensor([-2 * (1 - share) for share in logistic]))


def test_first_tokens_ends_at_the_cross_entropy_gradient() -> None:
    gaps = [-3.0, 0.0, 5.0]
    for beta in (1e-2, 1e-4, 1e-6):
        _, gradient = of_labels((beta,), gaps, [0, 1, 2])
        torch.testing.assert_close(gradient, -torch.ones(3), atol=3 * beta, rtol=0)
    assert of_labels((2.0,), gaps, [0, 1, 2])[1].abs()[2] < 1e-3  # far ahead: no pull is left


def test_mass_reads_the_sum_of_the_weighted_ids() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0])
    reference = torch.tensor([[0.5, 0.1, 0.1], [0.2, 0.0, 0.4]])
    policy = torch.tensor([[0.1, 0.3, 0.2], [0.4, 0.5, 0.2]])
    value = mass(policy.log(), reference.log(), None, weights, torch.arange(2))
    torch.testing.assert_close(value, torch.tensor([math.log(0.3 / 0.6) ** 2, 0.0]))


def test_vocabulary_is_torchs_divergence_and_that_of_the_logits_gradient() -> None:
    logits, reference = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
    value = vocabulary(ours, theirs, None, torch.ones(0), torch.arange(7))
    whole = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    torch.testing.assert_close(value.sum(), whole)
    torch.testing.assert_close(value, (theirs.exp() * (theirs - ours)).sum(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, (ours.exp() - theirs.exp()).detach())


def test_pact_with_the_gate_off_reads_the_full_context_alone() -> None:
    case = random_case()
    off = ObjectiveSettings(gate=False)
    value = pact(**{**case, "response_only": None}, settings=off)
    torch.testing.assert_close(value, pact(**case, settings=ObjectiveSettings(boost=0)))
    with pytest.raises(SettingError, match="expected response_only"):
        pact(**{**case, "response_only": None})


def test_pact_without_gate_and_weights_is_zero_at_the_reference() -> None:
    case = random_case()
    settings = ObjectiveSettings(gate=False, safety_weights=False)
    case["weights"] = weights_in_use(case["weights"], settings)
    value = pact(**{**case, "policy": case["full"]}, settings=settings)
    torch.testing.assert_close(value, torch.zeros(7), atol=1e-6, rtol=0)


def test_weights_that_hold_nothing_are_refused() -> None:
    zero = torch.zeros(4)
    with pytest.raises(SettingError, match="expected one with a weight above 0"):
        weights_in_use(zero, ObjectiveSettings())
    alike = weights_in_use(zero, ObjectiveSettings(safety_weights=False))
    assert alike.tolist() == [1, 1, 1, 1]
    with pytest.raises(SettingError, match="expected two safety tokens or more, found one"):
        weights_in_use(torch.ones(1), ObjectiveSettings(objective="pact"))
    weights_in_use(torch.ones(1), ObjectiveSettings(objective="confidence"))


def test_the_first_steps_count_more() -> None:
    settings = ObjectiveSettings(first_steps=2, first_weight=3)
    assert step_weights(torch.tensor([0, 1, 2, 0, 5]), settings).tolist() == [3, 3, 1, 3, 1]
    assert step_weights(torch.arange(3), ObjectiveSettings()).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [4, 4, 4]), ("linear", [4, 2.5, 1]), ("cosine", [4, 2.5, 1])],
)
def test_the_weight_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    settings = ObjectiveSettings(kl_weight=4, kl_schedule=schedule, kl_weight_end=1)
    assert [kl_weight_at(x, settings) for x in (0, 0.5, 1)] == pytest.approx(expected)
    if schedule == "cosine":
        assert kl_weight_at(0.25, settings) > 3.5


def test_an_objective_is_picked_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"expected one of none, pact, confidence, .*, or"):
        objective_named("mine")
    monkeypatch.setitem(OBJECTIVES, "mine", OBJECTIVES["confidence"])
    assert objective_named("mine") is OBJECTIVES["confidence"]
    assert objective_named("none") is None
    assert {"none", *OBJECTIVES} - {"mine"} == set(BUILT_IN_OBJECTIVES)
    hold_nothing = {n for n, one in OBJECTIVES.items() if one.replaces_cross_entropy}
    assert {"none", *hold_nothing} == set(HOLD_NOTHING)


def test_a_negative_weight_counts_as_none_in_pact() -> None:
    torch.manual_seed(0)
    policy, full, only = torch.randn(3, 5, 4).log_softmax(-1)
    steps = torch.arange(5)
    with_negative = pact(policy, full, only, torch.tensor([0.4, -0.3, 0.2, 0.1]), steps)
    without = pact(policy, full, only, torch.tensor([0.4, 0.0, 0.2, 0.1]), steps)
    torch.testing.assert_close(with_negative, without)
    assert (with_negative >= 0).all()

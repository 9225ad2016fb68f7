"""The objective of the study that is not the product's."""

from __future__ import annotations

import torch
from conftest import ROOT

from pact_offline.objectives.inputs import DEFAULTS
from pact_offline.objectives.registry import objective_named

VOCABULARY = 30
IDS, WEIGHTS = torch.tensor([2, 5, 9, 11]), torch.tensor([1.0, 0.5, 0.2, 0.0])
LABELS = torch.tensor([1, 2, 3, 5, 9, 20, 11])  # some of them safety tokens, one without weight


def test_what_is_held_is_given_that_the_label_is_not_said() -> None:
    objective = objective_named(f"{ROOT / 'stages' / 'given_not_label.py'}:given_not_label")
    assert objective is not None
    assert objective.needs_labels
    torch.manual_seed(0)
    policy = torch.randn(len(LABELS), VOCABULARY, requires_grad=True)
    reference = 2 * torch.randn(len(LABELS), VOCABULARY)

    def loss(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ours, theirs = one.log_softmax(-1), other.log_softmax(-1)
        labels = LABELS[:, None]
        return objective.per_step(
            ours[:, IDS], theirs[:, IDS], None, WEIGHTS, torch.arange(len(LABELS)), DEFAULTS,
            policy_label=ours.gather(1, labels)[:, 0],
            reference_label=theirs.gather(1, labels)[:, 0],
        )  # fmt: skip

    found = loss(policy, reference)
    kept = IDS[WEIGHTS > 0]
    classes = []
    for logits in (reference, policy.detach()):
        others = logits.scatter(1, LABELS[:, None], -torch.inf).softmax(-1)[:, kept]
        classes.append(torch.cat((others, 1 - others.sum(-1, keepdim=True)), -1))
    theirs, ours = classes
    by_hand = torch.special.xlogy(theirs, theirs / ours.clamp(min=1e-30)).sum(-1)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-4)

    found.sum().backward()
    assert policy.grad is not None
    assert policy.grad.gather(1, LABELS[:, None]).abs().max() < 1e-6
    assert policy.grad.abs().max() > 0.01
    assert loss(reference, reference).abs().max() < 1e-6

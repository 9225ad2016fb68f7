"""How far a policy has moved: the divergences by themselves; whole evaluations: test_evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_report import Page, make_drift, make_metrics, reference, render, sft
from torch import Tensor

from pact_offline.errors import InputError
from pact_offline.evaluation import drift
from pact_offline.evaluation.drift import (
    KeptLogProbabilities,
    answer_contexts,
    confidences_by_step,
    divergence,
    divergences_by_step,
    safety_classes,
)
from pact_offline.evaluation.metrics import Metrics
from pact_offline.models.load import load_model
from pact_offline.objectives.confidence import confidence
from pact_offline.rows.tokenizer import load_tokenizer


def logs(*steps: list[float]) -> Tensor:
    return torch.tensor(steps, dtype=torch.float64).log().float()


def test_a_divergence_worked_by_hand() -> None:
    reference, policy = logs([0.5, 0.25, 0.25]), logs([0.25, 0.25, 0.5])
    # 1/2 log 2 + 0 - 1/4 log 2; of the first id and the rest, 1/2 log 2 + 1/2 log 2/3.
    assert divergence(reference, policy).tolist() == pytest.approx([0.25 * np.log(2)])
    classes = [safety_classes(values, [0]) for values in (reference, policy)]
    assert classes[1].exp().tolist() == [pytest.approx([0.25, 0.75])]
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert divergence(*classes).tolist() == pytest.approx([expected])


def test_an_id_that_can_never_come_counts_nothing() -> None:
    never = torch.tensor([[0.0, -torch.inf]])
    assert divergence(never, never).tolist() == [0]


def test_the_safety_form_is_the_objectives() -> None:
    torch.manual_seed(0)
    reference, policy = torch.randn(2, 9, 50).log_softmax(dim=-1)
    weighted = [3, 17, 41]
    classes = [safety_classes(values, weighted) for values in (reference, policy)]
    trained = confidence(
        policy[:, weighted], reference[:, weighted], None, torch.ones(3), torch.arange(9)
    )
    torch.testing.assert_close(divergence(*classes), trained, rtol=1e-4, atol=1e-6)
    assert (divergence(*classes) <= divergence(reference, policy)).all()


def test_values_come_back_from_the_disk_as_they_were_and_leave_nothing(tmp_path: Path) -> None:
    kept = KeptLogProbabilities(tmp_path)
    values = [torch.randn(steps, 7) for steps in (3, 1, 2)]
    for one in values:
        kept.add(one)
    for _ in range(2):
        for ours, theirs in zip(kept, values, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    kept.close()
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(drift.tempfile, "TemporaryFile", lambda dir: full)
        kept = KeptLogProbabilities(tmp_path)
        with pytest.raises(InputError, match=r"expected room for .* MiB a response step"):
            kept.add(torch.zeros(64, 50_000))


@pytest.fixture
def read(aligned: Path) -> tuple[Any, list[Any]]:
    """A model, and answers of unlike lengths, one of them longer than is read."""
    model, tokenizer = load_model(str(aligned), "float32"), load_tokenizer(str(aligned))
    answers = ["No", "I can't help with that, I'm sorry, and I can't say more", "", "Sorry, no"]
    return model, answer_contexts(tokenizer, [[5, 6, 7], [8], [9, 10], [4] * 9], answers, 6)


def test_a_model_has_not_moved_from_itself(read: tuple[Any, list[Any]], tmp_path: Path) -> None:
    model, contexts = read
    kept = KeptLogProbabilities(tmp_path)
    confidences_by_step(model, contexts, [5, 40], 6, 4, kept)
    found = divergences_by_step(model, contexts, kept, [5, 40], 6, 4)
    assert found.safety.tolist() == found.vocabulary.tolist() == [0] * 6


def test_batches_do_not_matter(read: tuple[Any, list[Any]], base: Path, tmp_path: Path) -> None:
    model, contexts = read
    reference = load_model(str(base), "float32")
    found = []
    for batch_size in (1, 3):
        kept = KeptLogProbabilities(tmp_path)
        confidences_by_step(model, contexts, [5, 40], 6, batch_size, kept)
        found.append(divergences_by_step(reference, contexts, kept, [5, 40], 6, 4 - batch_size))
    assert found[0].safety == pytest.approx(found[1].safety, abs=1e-5)
    assert found[0].vocabulary == pytest.approx(found[1].vocabulary, abs=1e-5)
    assert (found[0].safety < found[0].vocabulary).all()


def test_a_table_that_is_padded_to_another_length_is_compared(
    read: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    model, contexts = read
    kept = KeptLogProbabilities(tmp_path)
    confidences_by_step(model, contexts, [5], 6, 4, kept)
    before = divergences_by_step(model, contexts, kept, [5], 6, 4)
    width = model.config.vocab_size
    model.resize_token_embeddings(width + 8, mean_resizing=False)
    model.lm_head.weight.data[width:] = 0
    after = divergences_by_step(model, contexts, kept, [5], 6, 4)
    assert np.isfinite(after.vocabulary).all()
    assert before.vocabulary.max() == 0


def moved(name: str, safety: list[float], whole: list[float]) -> Metrics:
    drift = make_drift().model_copy(
        update={
            "kl_safety": safety,
            "kl_vocabulary": whole,
            "kl_safety_mean": sum(safety) / len(safety),
            "kl_vocabulary_mean": sum(whole) / len(whole),
        }
    )
    return sft(name=name, drift=drift)


def test_divergences_are_a_table_and_curves_with_their_text(tmp_path: Path) -> None:
    runs = [moved("plain", [4.0, 2.0], [5.0, 3.5]), moved("held", [0.01, 0.00002], [0.5, 0.25])]
    page = Page(render(tmp_path, [reference(), *runs, make_metrics("unmeasured")]))
    assert "Run Safety tokens, nats All ids, nats plain 3.00 4.25 held 0.00501 0.375" in page.text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    safety, whole = (label for label in labels if "by response step" in label and "KL" in label)
    assert "plain: 4.00 nats at step 0, 4.00 at most; held: 0.01 nats at step 0" in safety
    assert "All ids. plain: 5.00 nats" in whole


def test_without_divergences_there_is_no_table_of_them(tmp_path: Path) -> None:
    page = Page(render(tmp_path, [reference(), sft()]))
    assert "Confidence on safety tokens" in page.text
    assert "KL divergence" not in page.text

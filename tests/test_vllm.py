"""One real engine, made once, for all that is asked of `VllmScorer`."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_scoring import IDS, LONGEST, contexts, scored, values
from tiny import make_model

from pact_offline.errors import ModelError, ScoringError
from pact_offline.scoring.vllm import VllmScorer
from pact_offline.scoring.vllm_ways import takes_rows_of_ids
from pact_offline.settings.stages import ScoreSettings

pytestmark = pytest.mark.vllm
SETTINGS = ScoreSettings(dtype="float32", batch_tokens=256)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vllm") / "llama", max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def scorer(path: Path) -> Iterator[VllmScorer]:
    with closing(VllmScorer(path, IDS, LONGEST, SETTINGS)) as made:
        yield made


def test_vllm_scorer_equals_transformers_each_time_it_is_asked(
    path: Path, scorer: VllmScorer
) -> None:
    expected = values("transformers", path, "float32")
    for order in (range(8), (4, 1, 7, 5)):
        some = [contexts()[index] for index in order]
        found = scored(scorer, some)
        assert sorted(found) == [*range(len(some))]
        for position, index in enumerate(order):
            np.testing.assert_allclose(found[position], expected[index], atol=1e-4)


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda found: found[1:], "expected 8 results, found 7"),
        (lambda found: [None, *found[1:]], r"expected log-confidences \[5, 6\], found none"),
        (lambda found: [found[0][:-1], *found[1:]], r"expected .*\[5, 6\], found \[4, 6\]"),
        (lambda found: 1 / 0, "vLLM stopped: division by zero"),
    ],
)
def test_what_vllm_loses_is_an_error(
    lose: Callable[[Any], Any],
    message: str,
    scorer: VllmScorer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = scorer._way.run
    monkeypatch.setattr(scorer, "_tokens_at_once", 10**6)  # all of them in one call
    monkeypatch.setattr(scorer._way, "run", lambda *given: lose(right(*given)))
    with pytest.raises(ScoringError, match=message):
        list(scorer.score(contexts()))


def test_a_context_beyond_the_models_positions_is_refused_in_those_words(
    path: Path,
) -> None:
    with pytest.raises(ModelError, match=r"at most 700 tokens.*one of 701; lower --max-tokens"):
        VllmScorer(path, IDS, LONGEST + 1, SETTINGS)


class Rows:
    """As vLLM 0.32 has it (#56984)."""

    def __init__(
        self,
        prompt_logprob_token_ids: "np.ndarray | None" = None,
        prompt_logprob_start: int | None = None,
    ) -> None: ...


class Lists:
    """The same, written as lists."""

    def __init__(
        self,
        prompt_logprob_token_ids: list[list[int]] | None = None,
        prompt_logprob_start: int | None = None,
    ) -> None: ...


class Flat:
    """One list of ids for every row (#54335)."""

    def __init__(
        self,
        prompt_logprob_token_ids: list[int] | None = None,
        prompt_logprob_start: int | None = None,
    ) -> None: ...


class FlatAlone:
    def __init__(self, prompt_logprob_token_ids: list[int] | None = None) -> None: ...


class Without:
    def __init__(self, logprob_token_ids: list[int] | None = None) -> None: ...


@pytest.mark.parametrize(
    ("params", "is_taken"),
    [(Rows, True), (Lists, True), (Flat, False), (FlatAlone, False), (Without, False)],
)
def test_vllms_own_way_is_taken_only_in_the_form_that_is_passed(
    params: type, is_taken: bool
) -> None:
    assert takes_rows_of_ids(params) == is_taken


def test_the_installed_vllm_is_known() -> None:
    from vllm import SamplingParams

    assert takes_rows_of_ids(SamplingParams)


@pytest.mark.parametrize("params", [Flat, Without])
def test_without_it_our_pooling_class_scores(
    params: type, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where vLLM's own way could run otherwise."""
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    monkeypatch.setattr("vllm.SamplingParams", params)
    with closing(VllmScorer(path, IDS, LONGEST, SETTINGS)) as scorer:
        assert scorer.how == "a pooling class of pact-offline"
        found = scored(scorer, contexts())
    expected = values("transformers", path, "float32")
    for position, wanted in enumerate(expected):
        np.testing.assert_allclose(found[position], wanted, atol=1e-4)

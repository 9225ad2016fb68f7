import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE
from tiny import make_model

from pact_offline.config import TokensSettings
from pact_offline.conversations import load_tokenizer, read_rows
from pact_offline.errors import InputError, ModelError, TargetsMismatchError
from pact_offline.safety_tokens import SafetyTokens, safety_direction

MODELS = REFERENCE / "safety_tokens"
EXPECTED = np.load(MODELS / "expected.npz")


def identify(**settings: object) -> SafetyTokens:
    return SafetyTokens.identify(
        str(MODELS / "aligned"),
        str(MODELS / "base"),
        read_rows(MODELS / "refusals.jsonl"),
        TokensSettings.model_validate(settings),
    )


@pytest.mark.parametrize("batch_size", [1, 5, 16])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("v_dir_k50", {}),
        ("v_dir_k20_max6_first10", {"examples": 10, "response_tokens": 6, "top_k": 20}),
    ],
)
def test_equals_the_published_script(name: str, settings: dict, batch_size: int) -> None:
    expected = EXPECTED[name]
    found = identify(**settings, batch_size=batch_size)
    assert found.ids == np.flatnonzero(expected).tolist()
    directions = [token.direction for token in found.tokens]
    np.testing.assert_allclose(directions, expected[found.ids], atol=1e-5)
    np.testing.assert_allclose(found.weights, expected[found.ids].clip(min=0), atol=1e-5)


def test_preference_log_ratio_is_minus_a_mean_divergence() -> None:
    found = identify(mode="pref_logratio", top_k=553)
    again = identify(mode="pref_logratio", top_k=553, batch_size=3)
    assert found.ids == again.ids
    np.testing.assert_allclose(found.weights, again.weights, atol=1e-5)
    assert found.ids != identify(top_k=50).ids


def test_direction_by_hand() -> None:
    aligned = np.array([0.5, 0.3, 0.1, 0.05, 0.05])
    difference = np.array([0.3, -0.1, 0.1, 9.0, 9.0])
    kept = np.array([0.3, -0.1, 0.1])
    scaled = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-6)
    expected = [*(scaled / (np.linalg.norm(scaled) + 1e-6)), 0, 0]
    np.testing.assert_allclose(safety_direction(difference, aligned, 3), expected)


def test_words_only_leaves_out_punctuation_and_special_tokens() -> None:
    tokenizer = load_tokenizer(str(MODELS / "aligned"))
    everything, words = identify(), identify(words_only=True)
    assert any(not any(map(str.isalpha, token.text)) for token in everything.tokens)
    assert all(any(map(str.isalpha, token.text)) for token in words.tokens)
    assert not set(words.ids) & set(tokenizer.all_special_ids)
    assert len(words.ids) == len(everything.ids)  # the next likely words take their places


def test_saved_tokens_load_as_they_were(tmp_path: Path) -> None:
    found = identify()
    found.save(tmp_path / "safety_tokens.json")
    loaded = SafetyTokens.load(tmp_path / "safety_tokens.json")
    assert loaded == found
    assert "\u00b7" in found.table()


def test_tokens_of_another_tokenizer_are_refused(tokens_file: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", extra="Completely different training text, zebra! " * 9)
    with pytest.raises(TargetsMismatchError, match="another vocabulary"):
        SafetyTokens.load(tokens_file, load_tokenizer(str(other)))


def test_a_base_with_another_vocabulary_is_refused(aligned: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", extra="zebra zebra quagga okapi " * 9)
    rows = read_rows(MODELS / "refusals.jsonl")
    with pytest.raises(ModelError, match="expected the vocabulary of"):
        SafetyTokens.identify(str(aligned), str(other), rows, TokensSettings())


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 9},
        {"tokens": []},
        {"tokens": [{"id": 1}]},
        {"tokens": 3},
        {"settings": None},
    ],
)
def test_a_damaged_file_is_refused(tokens_file: Path, change: dict) -> None:
    value = json.loads(tokens_file.read_text()) | change
    tokens_file.write_text(json.dumps(value))
    with pytest.raises(InputError, match=str(tokens_file)):
        SafetyTokens.load(tokens_file)

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import REFERENCE
from examples import prompt_of
from tiny import make_model

from pact_offline.errors import InputError, ModelError, TargetsMismatchError
from pact_offline.models.load import load_model
from pact_offline.models.locate import locate_model
from pact_offline.rows.read import read_rows
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.safety_tokens.file import SafetyToken, SafetyTokens
from pact_offline.safety_tokens.hand_list import read_hand_list
from pact_offline.safety_tokens.search import find_safety_tokens, likeliest, safety_direction
from pact_offline.settings.stages import TokensSettings

MODELS = REFERENCE / "safety_tokens"
EXPECTED = np.load(MODELS / "expected.npz")


def identify(**settings: object) -> SafetyTokens:
    return find_safety_tokens(
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


def test_the_likeliest_ids_by_hand() -> None:
    means = np.array([0.1, 0.5, 0.05, 0.3, 0.05])
    assert likeliest(means, 3).tolist() == [1, 3, 0]
    assert likeliest(means, 2, lambda i: i != 1).tolist() == [3, 0]
    assert likeliest(means, 9).tolist() == [1, 3, 0, 2, 4]


def test_direction_by_hand() -> None:
    difference = np.array([0.3, -0.1, 0.0, 0.1])
    kept = np.array([0.3, -0.1, 0.1])
    scaled = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-6)
    first, second, third = scaled / (np.linalg.norm(scaled) + 1e-6)
    np.testing.assert_allclose(safety_direction(difference), [first, second, 0, third])


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


def test_the_digest_of_tokens_is_of_their_ids_and_weights_alone() -> None:
    def digest(first: tuple[int, float], second: tuple[int, float], text: str = "no") -> str:
        tokens = tuple(SafetyToken(i, text, weight) for i, weight in (first, second))
        return SafetyTokens(tokens, text, {"made": text}).digest

    same = digest((5, 0.5), (7, -0.2))
    assert digest((5, 0.5), (7, -0.3), "yes") == same  # either direction weighs 0
    assert digest((5, 0.5), (7, 0.2)) != same
    assert digest((5, 0.5), (8, -0.2)) != same
    assert len(same) == 64


def test_tokens_of_another_tokenizer_are_refused(tokens_file: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", extra="Completely different training text, zebra! " * 9)
    with pytest.raises(TargetsMismatchError, match="another vocabulary"):
        SafetyTokens.load(tokens_file, load_tokenizer(str(other)))


def test_a_base_with_another_vocabulary_is_refused(aligned: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", extra="zebra zebra quagga okapi " * 9)
    rows = read_rows(MODELS / "refusals.jsonl")
    with pytest.raises(ModelError, match="expected the vocabulary of"):
        find_safety_tokens(str(aligned), str(other), rows, TokensSettings())


ONE = {"id": 1, "text": "a", "direction": 0.5, "aligned": None, "base": None}


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 9},
        {"tokens": []},
        {"tokens": [{"id": 1}]},
        {"tokens": 3},
        {"settings": None},
        {"tokens": [ONE | {"direction": math.inf}]},
        {"tokens": [ONE | {"direction": 10**400}]},
        {"tokens": [ONE | {"id": 2**40}]},
        {"tokens": [ONE | {"text": "\ud800"}]},
    ],
)
def test_a_damaged_file_is_refused(tokens_file: Path, change: dict) -> None:
    value = json.loads(tokens_file.read_text()) | change
    tokens_file.write_text(json.dumps(value))
    with pytest.raises(InputError, match=str(tokens_file)):
        SafetyTokens.load(tokens_file)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_log_ratio_equals_a_pass_with_both_models_in_memory(batch_size: int) -> None:
    """Pair by pair: d = mean over steps of p_aligned * (log p_base - log p_aligned)."""
    pairs = read_rows(MODELS / "refusals.jsonl")[:6]
    tokenizer = load_tokenizer(str(MODELS / "aligned"))
    models = [load_model(str(MODELS / name), "float32") for name in ("aligned", "base")]
    ratios, means = [], []
    for row in pairs:
        response = tokenizer(row.response, add_special_tokens=False).input_ids[:64]
        prompts = [
            prompt_of(tokenizer, row.prompt),
            tokenizer(f"User: {row.prompt[0]['content']}\n\nAssistant: ").input_ids,
        ]
        ours, theirs = (
            model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            .detach().double().log_softmax(-1)
            for model, prompt in zip(models, prompts, strict=True)
        )  # fmt: skip
        ratios.append((ours.exp() * (theirs - ours)).mean(0))
        means.append(ours.exp().mean(0))
    kept = likeliest(torch.stack(means).mean(0).numpy(), 50)
    expected = safety_direction(torch.stack(ratios).mean(0).numpy()[kept])
    found = identify(mode="pref_logratio", examples=6, batch_size=batch_size)
    assert found.ids == sorted(kept)
    by_id = dict(zip(kept.tolist(), expected, strict=True))
    directions = [token.direction for token in found.tokens]
    np.testing.assert_allclose(directions, [by_id[i] for i in found.ids], atol=1e-5)


@pytest.mark.parametrize("mode", ["p_diff", "pref_logratio"])
def test_one_model_is_in_memory_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    real = load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        assert not any(model() is not None for model in alive), "two models in memory"
        model = real(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("pact_offline.models.load.load_model", watched)
    identify(mode=mode, examples=2)
    assert len(alive) == 2


def hand_made(folder: Path, entries: Any) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_a_hand_made_list_of_words_and_ids(
    aligned: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    path, output = hand_made(tmp_path, [" can", 5, [" I", 0.5], ["s", 0]]), tmp_path / "t.json"
    result = run("tokens", "--aligned", aligned, "--from-list", path, "-o", output)
    assert result.exit_code == 0, result.output
    assert "\u00b7can" in result.stdout
    tokenizer = load_tokenizer(str(aligned))
    loaded = SafetyTokens.load(output, tokenizer)
    weights = dict(zip(loaded.ids, loaded.weights.tolist(), strict=True))
    words = {tokenizer.decode([i]): weight for i, weight in weights.items() if i != 5}
    assert words == {" can": 1, " I": 0.5, "s": 0}
    assert weights[5] == 1
    assert loaded.ids == sorted(loaded.ids)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            [" can", " sorry sorry"],
            "entry 2: expected a word of one token, found ' sorry sorry'",
        ),
        ([" can", " can"], "entry 2: expected each token once, found id"),
        ([99999], "entry 1: expected an id below"),
        ([-1], "entry 1: expected an id below"),
        ([True], "entry 1: expected a word, an id, or a pair, found True"),
        ([[" can", "much"]], "entry 1: expected a weight of 0 or more, found 'much'"),
        ([[" can", -1]], "entry 1: expected a weight of 0 or more, found -1"),
        ([[" can", 10**400]], "entry 1: expected a weight of 0 or more, found 1000"),
        (["\ud800"], "entry 1: expected a word, an id, or a pair, found"),
        ([[" can", float("nan")]], "entry 1: expected a weight of 0 or more, found nan"),
        ([""], "entry 1: expected a word, an id, or a pair, found ''"),
        ([], "expected a list of words or ids, found []"),
        ({"a": 1}, "expected a list of words or ids, found {'a': 1}"),
    ],
)
def test_a_bad_list_is_refused(
    entries: Any, expected: str, aligned: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    path, output = hand_made(tmp_path, entries), tmp_path / "tokens.json"
    line = fails("tokens", "--aligned", aligned, "--from-list", path, "-o", output)
    assert f"{path}: {expected}" in line
    assert not output.exists()


def test_the_pieces_of_a_word_are_shown(aligned: Path, tmp_path: Path) -> None:
    path = hand_made(tmp_path, [" sorry can"])
    with pytest.raises(InputError, match="in 3 pieces: ' sorr', 'y', ' can'"):
        read_hand_list(path, str(aligned))


def test_tokens_say_which_models_and_refusals_they_were_found_from(
    aligned: Path, base: Path, rows_file: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    words = ["tokens", "--aligned", aligned, "--refusals", rows_file, "--top-k", 7]
    found = {}
    for name, given in (("one", base), ("again", base), ("other", make_model(tmp_path / "m"))):
        result = run(*words, "--base", given, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        found[name] = SafetyTokens.load(tmp_path / name)
    one, other = found["one"].made_from, found["other"].made_from
    assert one is not None
    assert other is not None
    assert one == found["again"].made_from
    assert one.models["aligned"] == locate_model(str(aligned)).identity
    assert one.models["base"] == locate_model(str(base)).identity
    assert (one.difference(other) or "").startswith("base model: expected weights")
    rows = replace(one, rows={"refusals": "others"})
    assert (one.difference(rows) or "").startswith("refusals prompts: expected sha256")
    assert one.difference(one) is None


def test_a_file_without_what_it_was_made_from_still_loads(tokens_file: Path) -> None:
    value = json.loads(tokens_file.read_text())
    del value["made_from"]
    tokens_file.write_text(json.dumps(value))
    assert SafetyTokens.load(tokens_file).made_from is None
    tokens_file.write_text(json.dumps(value | {"made_from": {"models": {}}}))
    with pytest.raises(InputError, match="expected safety tokens, found a bad entry"):
        SafetyTokens.load(tokens_file)


def test_a_place_that_no_tokens_can_take_is_refused_before_a_model_is_loaded(
    aligned: Path, base: Path, rows_file: Path, tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pact_offline.models.load.load_model", None)
    words = ["tokens", "--aligned", aligned, "--base", base, "--refusals", rows_file]
    for place in (tmp_path, ".", "/", rows_file / "below"):
        fails(*words, "-o", place)

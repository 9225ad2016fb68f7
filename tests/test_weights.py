"""Weights come whole, from safetensors in the model's own directory, or the model is refused."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import Result
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pact_offline.errors import ModelError, PactError, UnsupportedModelError
from pact_offline.models.load import load_model, make_savable
from pact_offline.models.locate import locate_model, positions_of, require_no_other_weights
from pact_offline.rows.tokenizer import load_tokenizer

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = str(sprung)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._sprung, "w")


def set_trap(model: Path) -> Path:
    """Put pickled weights into a model; what is made where they are unpickled."""
    sprung = model.parent / "sprung"
    (model / PICKLED).write_bytes(pickle.dumps(Trap(sprung)))
    index = {"weight_map": {"lm_head.weight": PICKLED}}
    (model / f"{PICKLED}.index.json").write_text(json.dumps(index))
    return sprung


@pytest.fixture
def model(aligned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(aligned, tmp_path / "model"))


@pytest.fixture
def no_torch_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"torch.load of {args[0]}")

    monkeypatch.setattr(torch, "load", load)


def test_the_trap_of_these_tests_works(model: Path) -> None:
    sprung = set_trap(model)
    with (model / PICKLED).open("rb") as file:
        pickle.load(file).close()  # noqa: S301 (of our own)
    assert sprung.is_file()


def _commands(
    model: Path, base: Path, rows: Path, tokens: Path, folder: Path
) -> dict[str, list[Any]]:
    return {
        "finetune": ["--model", model, "--rows", rows, "--objective", "none", "--epochs", "1"],
        "score": ["--model", model, "--rows", rows, "--safety-tokens", tokens,
                  "--cache", folder / "cache", "--backend", "transformers"],
        "evaluate": ["--model", model, "--safety-tokens", tokens, "--name", "m", "--task", rows,
                     "--max-new-tokens", "2"],
        "tokens": ["--aligned", model, "--base", base, "--refusals", rows],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["finetune", "score", "evaluate", "tokens"])
@pytest.mark.usefixtures("no_torch_load")
def test_pickled_weights_beside_safetensors_are_never_opened(
    command: str, model: Path, base: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    sprung = set_trap(model)
    options = _commands(model, base, rows_file, tokens_file, tmp_path)[command]
    result = run(command, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").exists()
    assert not sprung.exists()


@pytest.mark.parametrize("command", ["finetune", "score", "evaluate", "tokens"])
@pytest.mark.usefixtures("no_torch_load")
def test_a_model_of_pickled_weights_alone_is_refused(
    command: str, model: Path, base: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    sprung = set_trap(model)
    (model / WEIGHTS).unlink()
    options = _commands(model, base, rows_file, tokens_file, tmp_path)[command]
    line = fails(command, *options, "-o", tmp_path / "out")
    assert f"{model}: expected weights as {WEIGHTS} or {INDEX}, found neither" in line
    assert not sprung.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_torch_load")
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_pickled_weights_that_a_file_names_are_refused(file: str, model: Path) -> None:
    """transformers opens them, whatever `use_safetensors` says."""
    sprung = set_trap(model)
    if file == INDEX:
        (model / WEIGHTS).unlink()
        shutil.copy(model / f"{PICKLED}.index.json", model / INDEX)
    else:
        shutil.copy(model / PICKLED, model / "adapter_model.bin")
        _change(model, transformers_weights="adapter_model.bin")
    for use in (locate_model, lambda path: load_model(path, "float32")):
        with pytest.raises(ModelError, match=r"(weight_map|transformers_weights): .*\.bin'$"):
            use(str(model))
    assert not sprung.exists()


def _change(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def _with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def broken(model: Path) -> None:
        weights = load_file(model / WEIGHTS)
        change(weights)
        save_file(weights, model / WEIGHTS, metadata={"format": "pt"})

    return broken


def _with_index(weight_map: Any) -> Callable[[Path], None]:
    def broken(model: Path) -> None:
        (model / WEIGHTS).rename(model / "a.safetensors")
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return broken


def _with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def _halve(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])


def _gone(model: Path) -> None:
    """As in a hub's cache that was copied without what its links point to."""
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model / "gone")


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no header": (_with_text(WEIGHTS, "x" * 100), "cannot be loaded: Error while deserializing"),
    "cut": (_halve, "cannot be loaded: Error while deserializing header: incomplete"),
    "a link to nothing": (_gone, "found neither"),
    "other shapes": (
        _with_weights(lambda w: w.update({NORM: w[NORM][1:].clone()})),
        "weights of other shapes than config.json's",
    ),
    "a weight less": (
        _with_weights(lambda w: w.pop(NORM)),
        f"expected weights of all that config.json describes, found none of {NORM}",
    ),
    "an index without shards": (
        _with_index({NORM: "b.safetensors"}), f"{NORM}: no such file: b.safetensors"
    ),
    "an index to elsewhere": (
        _with_index({NORM: "../model/a.safetensors"}), "expected a file *.safetensors of this dir"
    ),
    "an index of nothing": (_with_index({}), "weight_map: expected a file of each weight"),
    "an index that is a list": (
        lambda model: (_with_index({})(model), (model / INDEX).write_text("[]")),
        f"{INDEX}: expected a JSON object, found list",
    ),
    "config no JSON": (_with_text("config.json", "{"), "config.json:1: expected JSON"),
    "config a list": (_with_text("config.json", "[]"), "expected a JSON object, found list"),
    "unknown model": (lambda model: _change(model, model_type="nosuch"), "model type `nosuch`"),
    "config of text": (
        lambda model: _change(model, hidden_size="x"),
        "Validation error for field 'hidden_size': TypeError: Field",
    ),
    "generation config no JSON": (
        _with_text("generation_config.json", "{"), "generation_config.json:1: expected JSON"
    ),
    "an activation of nobody": (
        lambda model: _change(model, hidden_act="nosuch"), "cannot be loaded: no 'nosuch'"
    ),
    "attention of a repository": (
        lambda model: _change(model, _attn_implementation="kernels-community/flash-attn"),
        "_attn_implementation: expected an implementation of transformers, found 'kernels-comm",
    ),
    "attention of a repository, deeper": (
        lambda model: _change(model, text_config={"_attn_implementation": "someone/kernel@v1"}),
        "found 'someone/kernel@v1', code of a repository, which is never run",
    ),
    "no chat model": (lambda model: _change(model, model_type="t5"), "T5Config"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_in_one_line(name: str, model: Path) -> None:
    broken, said = BROKEN[name]
    broken(model)
    with pytest.raises(ModelError) as caught:
        load_model(str(model), "float32")
    _require_line(caught.value, model, said)
    try:
        locate_model(str(model))
    except ModelError as error:
        _require_line(error, model, said)


def test_a_tokenizer_that_loses_text_is_refused_with_what_mends_it(model: Path) -> None:
    """transformers 5 makes SentencePiece of a DeepSeek distillate's bytes where it lies on disk."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    for kind in ("LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        (model / "tokenizer_config.json").write_text(
            json.dumps({**config, "tokenizer_class": kind})
        )
        if kind.startswith("Llama"):
            with pytest.raises(ModelError) as caught:
                load_tokenizer(str(model))
            _require_line(caught.value, model, "found 'hello,myfriend.iamhere' by LlamaTokenizer")
        else:
            assert load_tokenizer(str(model)).get_vocab()


def test_a_tokenizer_whose_own_words_are_few_is_taken(tmp_path: Path) -> None:
    """It loses what it does not know by its own file, whatever class reads it."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "I": 1, "am": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    LlamaConfig(vocab_size=3, hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == {"<unk>": 0, "I": 1, "am": 2}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"model": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused_in_one_line(name: str, text: str, model: Path) -> None:
    if name == "tokenizer_config.json" and text in ("{}", '{"model": 3}'):
        text = '{"tokenizer_class": 3}'
    (model / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(model))
    is_object = text.startswith("{") and text.endswith("}")
    where = "" if is_object else f"{model / name}:"
    _require_line(caught.value, model, f"no tokenizer could be loaded: {where}")


def _require_line(error: PactError, model: Path, said: str) -> None:
    assert str(error).startswith(str(model))
    assert said in str(error)
    assert "\n" not in str(error)


def _resharded(model: Path, folder: Path) -> Path:
    load_model(str(model), "float32").save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_sharded_weights_are_the_same_model(model: Path, tmp_path: Path) -> None:
    whole = load_model(str(model), "float32")
    folder = _resharded(model, tmp_path / "sharded")
    shards = {file.name for file in folder.glob("*.safetensors")}
    assert shards < {*locate_model(str(folder)).identity}
    assert len(shards) > 1
    sharded = load_model(str(folder), "float32").state_dict()
    assert all(torch.equal(sharded[name], weight) for name, weight in whole.state_dict().items())


def test_a_models_identity_is_of_its_config_and_the_weights_that_are_read(
    model: Path, tmp_path: Path
) -> None:
    """Stores and adapters of earlier releases keep theirs: it is that of the whole folder."""
    for folder in (model, _resharded(model, tmp_path / "sharded")):
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        before = {file.name: sha256(file.read_bytes()).hexdigest() for file in files}
        assert [*locate_model(str(folder)).identity.items()] == [*before.items()]
        for stray in ("consolidated", "optimizer", "adapter_model"):
            save_file({"x": torch.zeros(2)}, folder / f"{stray}.safetensors")
        (folder / "training_state.safetensors").write_bytes(b"rubbish")
        assert locate_model(str(folder)).identity == before


def test_a_single_file_of_weights_goes_before_an_index(model: Path, tmp_path: Path) -> None:
    """transformers reads it alone."""
    shutil.copytree(_resharded(model, tmp_path / "sharded"), model, dirs_exist_ok=True)
    weights = load_file(model / WEIGHTS)
    weights[NORM] += 1
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    assert {*locate_model(str(model)).identity} == {"config.json", WEIGHTS}
    assert torch.equal(load_model(str(model), "float32").state_dict()[NORM], weights[NORM])


def test_weights_beside_a_models_own_are_left_to_transformers(model: Path, tmp_path: Path) -> None:
    """vLLM reads every file of a folder without an index, and with one it reads the index first."""
    sharded = _resharded(model, tmp_path / "sharded")
    for folder in (model, sharded):
        require_no_other_weights(folder)
    save_file({"x": torch.zeros(2)}, sharded / "consolidated.safetensors")
    require_no_other_weights(sharded)  # its index names all that is read
    shutil.copytree(sharded, model, dirs_exist_ok=True)
    with pytest.raises(UnsupportedModelError, match=f"beside {WEIGHTS}.*found consolidat"):
        require_no_other_weights(model)


@pytest.mark.parametrize(
    ("said", "dropped"),
    [
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"early_stopping": True}, "early_stopping True"),
        ({"length_penalty": 2.0, "top_p": 0.5, "top_k": 50}, "top_p 0.5, length_penalty 2.0"),
        ({"output_scores": True}, "output_scores True"),
        ({"pad_token_id": -1, "num_beams": 2, "early_stopping": True}, "pad_token_id -1"),
    ],
)
def test_what_transformers_refuses_to_save_of_a_generation_config_is_left_out(
    said: dict[str, Any], dropped: str, model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], **said}))
    loaded = load_model(str(model), "float32")
    make_savable(loaded, str(model))
    expected = f"{model}: generation config: what is saved has no {dropped}, of no use there"
    ours = [one.message for one in caplog.records if one.name == make_savable.__module__]
    assert ours == [expected]
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    gone = {part.split(" ")[0] for part in dropped.split(", ")}
    kept = {key: value for key, value in said.items() if key not in gone}
    assert {**saved, "eos_token_id": [2, 5], **kept} == saved
    assert not gone & {*saved}


def _loading_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of what takes `trust_remote_code`: loaders of transformers, and vLLM's engine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_loader = name.endswith((".from_pretrained", ".from_config"))
            if (is_loader and not name.startswith("Peft")) or name.split(".")[-1] in (
                "LLM", "EngineArgs", "pipeline",
            ):  # fmt: skip
                yield node


def _says_no(pairs: Iterator[tuple[Any, ast.expr]]) -> bool:
    return any(
        name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value is False
        for name, value in pairs
    )


def test_every_loader_is_told_to_run_no_code_of_a_repository() -> None:
    calls = 0
    for file in sorted((ROOT / "pact_offline").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        options = any(
            _says_no((getattr(k, "value", None), v) for k, v in zip(d.keys, d.values, strict=True))
            for d in ast.walk(tree)
            if isinstance(d, ast.Dict)
        )
        for call in _loading_calls(tree):
            calls += 1
            is_by_options = options and any(keyword.arg is None for keyword in call.keywords)
            assert is_by_options or _says_no((k.arg, k.value) for k in call.keywords), (
                f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call.func)}"
            )
    assert calls >= 8


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 1024),
        ({"rope_scaling": {"type": "longrope", "factor": 8.0}}, 1024),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 256}}, 1024),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
         1024),
        ({"rope_scaling": "rubbish"}, 1024),
    ],
)  # fmt: skip
def test_positions_are_those_that_a_config_means(
    config: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    """Some kinds of stretched positions count in `max_position_embeddings`, some do not."""
    written = {"max_position_embeddings": 1024, **config}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert positions_of(tmp_path) == expected

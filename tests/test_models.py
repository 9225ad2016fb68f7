"""Models and tokenizers from disk: what fixes them, and what of them is never run."""

import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import prompt_of
from peft import LoraConfig, get_peft_model
from tiny import make_model, states_of_head
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

from pact_offline import files, models
from pact_offline.errors import InputError, ModelError
from pact_offline.models.generate import generate
from pact_offline.models.load import load_model
from pact_offline.models.locate import locate_model
from pact_offline.models.log_confidences import _padded_logits, reads_padding, response_logits
from pact_offline.models.vllm_answers import _repetition_penalty
from pact_offline.models.vllm_engine import prepare_environment
from pact_offline.rows.chat import Chat
from pact_offline.rows.contexts import Context
from pact_offline.rows.describe import end_ids
from pact_offline.rows.positions import Positions
from pact_offline.rows.tokenizer import load_tokenizer
from pact_offline.scoring.scorer import Scored
from pact_offline.scoring.transformers import TransformersScorer

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Config(LlamaConfig):
    model_type = "custom"


class Model(LlamaForCausalLM):
    pass


class Custom(PreTrainedTokenizerFast):
    pass
"""


def with_code(aligned: Path, folder: Path, part: str) -> Path:
    """A model whose tokenizer, or whose weights, ask for code of the repository's own."""
    shutil.copytree(aligned, folder)
    (folder / "custom.py").write_text(CODE)
    if part == "tokenizer":
        path, change = folder / "tokenizer_config.json", {"tokenizer_class": "Custom"}
        change["auto_map"] = {"AutoTokenizer": [None, "custom.Custom"]}  # type: ignore[assignment]
    else:
        path, change = folder / "config.json", {"model_type": "custom"}
        change["auto_map"] = {  # type: ignore[assignment]
            "AutoConfig": "custom.Config",
            "AutoModelForCausalLM": "custom.Model",
        }
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_code_of_a_repository_is_neither_run_nor_asked_about(
    part: str, aligned: Path, tmp_path: Path, rows_file: Path
) -> None:
    model = with_code(aligned, tmp_path / "custom", part)
    command = [
        sys.executable, "-m", "pact_offline", "finetune", "--model", str(model),
        "--rows", str(rows_file), "--objective", "none", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pact-offline:")]
    assert "code of its own repository, which is never run" in line
    assert "[y/N]" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.rglob("ran")]


def age(path: Path) -> None:
    """Wait out the moment in which a change is too fresh to be remembered."""
    time.sleep(max(0.0, path.stat().st_ctime + files._SETTLED_NS / 1e9 - time.time() + 0.01))


def write_over(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def write_mapped(path: Path, data: bytes) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = data


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("write", [write_over, write_mapped, replace])
def test_weights_changed_with_their_time_kept_are_others(
    write: Callable[[Path, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_NS", 50_000_000)
    model = make_model(tmp_path / "m")
    weights = model / "model.safetensors"
    age(weights)
    before = locate_model(str(model)).identity
    read: list[Path] = []
    right = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or right(path))
    assert locate_model(str(model)).identity == before
    assert read == []  # remembered
    status, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    write(weights, bytes(data))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert locate_model(str(model)).identity != before
    assert weights in read


@pytest.mark.parametrize("moment", ["before they are read", "while they are used"])
def test_weights_that_change_while_they_are_scored_are_not_bound(
    moment: str,
    tmp_path: Path,
    rows_file: Path,
    tokens_file: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cache = make_model(tmp_path / "m", seed=1), tmp_path / "cache"
    other = (make_model(tmp_path / "other", seed=2) / "model.safetensors").read_bytes()

    class Meanwhile(TransformersScorer):
        def __init__(self, *given: Any) -> None:
            if moment == "before they are read":
                (model / "model.safetensors").write_bytes(other)
            super().__init__(*given)

        def score(self, contexts: Sequence[Context]) -> Iterator[Scored]:
            yield from super().score(contexts)
            (model / "model.safetensors").write_bytes(other)

    monkeypatch.setattr("pact_offline.scoring.transformers.TransformersScorer", Meanwhile)
    line = fails(
        "score", "--model", model, "--rows", rows_file, "--safety-tokens", tokens_file,
        "--cache", cache, "--backend", "transformers", "-o", tmp_path / "targets.json",
    )  # fmt: skip
    assert f"{model}: expected its config and weights to stay" in line
    assert not (tmp_path / "targets.json").exists()
    assert cache.exists() == (moment == "while they are used")


def test_an_answer_ends_at_every_end_that_the_model_knows(aligned: Path) -> None:
    """Gemma's and Phi's turns end by another id than their tokenizer's end of text."""
    model, tokenizer = load_model(str(aligned), "float32"), load_tokenizer(str(aligned))
    chat = [{"role": "user", "content": "Hello there"}]
    prompt = torch.tensor([prompt_of(tokenizer, chat)])
    free = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
        do_sample=False, pad_token_id=0, eos_token_id=2,
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    end = free[3]
    model.generation_config.eos_token_id = [2, end]
    short = [{"role": "user", "content": "Hi"}]
    for chats in ([chat], [short, chat]):  # alone, and beside one that may be longer
        asked = [prompt_of(tokenizer, one) for one in chats]
        answer = generate(model, tokenizer, asked, max_new_tokens=12, batch_size=2)[-1]
        expected = tokenizer.decode(free[: free.index(end)], skip_special_tokens=True).strip()
        assert answer == expected


def test_an_answer_ends_at_the_templates_own_end_of_turn(aligned: Path) -> None:
    """No config names it: some fine-tuned models come so."""
    model, tokenizer = load_model(str(aligned), "float32"), load_tokenizer(str(aligned))
    model.generation_config.eos_token_id = model.config.eos_token_id = 5
    chat = Chat(tokenizer)
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "!"
    prompt = prompt_of(tokenizer, [{"role": "user", "content": "Hello there"}])
    free = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    end = free[0, len(prompt) + 3].item()
    before = tokenizer.decode(free[0, len(prompt) : len(prompt) + 3]).strip()
    steps = {"max_new_tokens": 6, "batch_size": 1}
    assert generate(model, tokenizer, [prompt], **steps) != [before]
    assert generate(model, tokenizer, [prompt], **steps, end_of_turn=end) == [before]
    assert chat.end_of_turn in end_ids(str(aligned), chat)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    assert Chat(tokenizer).end_of_turn is None


def answers_of(model: Path, prompts: list[list[int]]) -> list[str]:
    loaded, tokenizer = load_model(str(model), "float32"), load_tokenizer(str(model))
    return generate(loaded, tokenizer, prompts, max_new_tokens=8, batch_size=2)


OTHER_WAYS: dict[str, dict[str, Any]] = {
    "a dict of all": {"return_dict_in_generate": True, "output_scores": True},
    "stop strings": {"stop_strings": ["e"]},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "dola": {"dola_layers": "high"},
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 4.0},
    "guidance": {"guidance_scale": 3.0},
    "contrast": {"penalty_alpha": 0.9, "top_k": 4},
    "lengths": {"min_new_tokens": 20, "max_length": 3},
    "n-grams": {"no_repeat_ngram_size": 1},
    "suppressed": {"suppress_tokens": list(range(3, 300))},
    "sampling": {"do_sample": True, "temperature": 9.0},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_answers_are_greedy_whatever_the_model_generates_by(
    way: str, aligned: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(aligned, tmp_path / "model"))
    config = model / "generation_config.json"
    said = json.loads(config.read_text())
    prompts = [[5, 6, 7, 8], [9, 40, 41], [77, 200]]
    config.write_text(json.dumps({**said, **OTHER_WAYS[way]}))
    assert answers_of(model, prompts) == answers_of(aligned, prompts)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_a_penalty_of_repetition_is_heeded_alike_by_both_engines(
    place: str, aligned: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(aligned, tmp_path / "model"))
    if place == "config.json":
        (model / "generation_config.json").unlink()
    said = json.loads((model / place).read_text())
    prompts = [[5, 6, 7, 8]]
    assert _repetition_penalty(model) == 1
    (model / place).write_text(json.dumps({**said, "repetition_penalty": 5.0}))
    assert _repetition_penalty(model) == 5
    assert answers_of(model, prompts) != answers_of(aligned, prompts)
    for wrong in (-1.0, 0, "much"):
        (model / place).write_text(json.dumps({**said, "repetition_penalty": wrong}))
        expected = f"{model}: generation config: repetition_penalty: expected a number above 0"
        for use in (_repetition_penalty, lambda folder: answers_of(folder, prompts)):
            with pytest.raises(ModelError, match=expected):
                use(model)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_model_that_has_answered_keeps_its_own_generation_config(
    has_adapter: bool, aligned: Path
) -> None:
    """It may be saved afterwards."""
    model: Any = load_model(str(aligned), "float32")
    model.generation_config.num_beams = 3
    own = model.generation_config
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if has_adapter else model
    tokenizer = load_tokenizer(str(aligned))
    assert generate(asked, tokenizer, [[5, 6]], max_new_tokens=2, batch_size=1)
    assert model.generation_config is asked.generation_config is own
    assert own.num_beams == 3


@pytest.mark.parametrize("has_adapter", [False, True])
def test_the_head_is_given_no_slice_of_states(has_adapter: bool, aligned: Path) -> None:
    """Torch would copy it for every prompt of a batch on a CPU: a third of the time, and GBs."""
    model: Any = load_model(str(aligned), "float32")
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if has_adapter else model
    given = states_of_head(model)
    generate(
        asked, load_tokenizer(str(aligned)), [[5, 6, 7], [8, 9]], max_new_tokens=3, batch_size=2
    )
    assert [states.shape[:2] for states in given] == [(2, 1)] * 3
    assert all(states.is_contiguous() for states in given)
    assert not model.get_output_embeddings()._forward_pre_hooks


RECURRENT = {
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": {
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "attention_window_size": 16, "lru_width": 32,
    },
    "mamba": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_give_the_same_values_in_a_batch_and_alone(kind: str) -> None:
    """Some carry padding on in their state, whatever the mask says."""
    set_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4}
    config = CONFIG_MAPPING[kind](**sizes, **RECURRENT[kind])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # trained models have no zero biases
        if parameter.dim() > 1 or parameter.std() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = [(np.arange(5, 5 + n), [(n - 3, n)]) for n in (6, 12, 24)]
    assert reads_padding(model) == (kind != "mamba")
    for together, row in zip(response_logits(model, rows), rows, strict=True):
        torch.testing.assert_close(together, response_logits(model, [row])[0], atol=1e-5, rtol=1e-5)
    starts = [(ids, spans[0][0]) for ids, spans in rows]
    for logits, same in zip(
        models.response_logits(model, starts), response_logits(model, rows), strict=True
    ):
        assert torch.equal(logits, same)
    if kind != "mamba":
        padded = _padded_logits(model, rows)[0] - response_logits(model, rows[:1])[0]
        assert padded.abs().max() > 0.01
    model.train()
    assert reads_padding(model) == (kind != "mamba")
    assert model.training


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="vLLM on a CPU")
def test_what_vllm_preloads_is_found_where_the_path_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "a b" / "torch" / "lib" / "libgomp.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(torch, "__file__", str(library.parents[1] / "__init__.py"))
    monkeypatch.setenv("LD_PRELOAD", "libmine.so")
    for _ in range(2):  # the second time all is named
        prepare_environment()
        mine, link = os.environ["LD_PRELOAD"].split(":")
        assert mine == "libmine.so"
        assert " " not in link
        assert Path(link).resolve() == library.resolve()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_ends_where_a_table_of_positions_does(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / family, seed=1, family=family)
    model, tokenizer = load_model(str(folder), "float32"), load_tokenizer(str(folder))
    most = model.config.get_text_config().max_position_embeddings
    model.generation_config.eos_token_id = None
    prompts = [[5] * (most - 3), [6] * 4]
    three, six = (
        generate(model, tokenizer, prompts, max_new_tokens=most_new, batch_size=1)
        for most_new in (3, 6)
    )
    assert (six[0] == three[0]) is (family == "gpt2")
    assert six[1] != three[1]
    expected = f"rows:1: expected at most {most - 1} tokens, found {most}"
    with pytest.raises(InputError, match=expected):
        Positions(folder).require([5] * most, "rows:1")
    Positions(folder).require([5] * (most - 1), "rows:1")

"""A reference that is a model with a LoRA adapter: scored, trained from, evaluated as one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import TEMPLATE, make_model
from transformers import LlamaForCausalLM

from pact_offline.cache.targets import TargetCache
from pact_offline.errors import InputError, ModelError, TargetsMismatchError
from pact_offline.fine_tuned import FineTuned
from pact_offline.made_from import MadeFrom
from pact_offline.models.load import load_model
from pact_offline.models.locate import ModelFiles, split_adapter
from pact_offline.references import locate_reference


@pytest.fixture
def adapter(command: list[Any], tmp_path: Path, run: Callable[..., Result]) -> Path:
    """An adapter of `finetune`; without its own facts, one of anybody's."""
    out = tmp_path / "adapter"
    words = [*command, "--objective", "none", "--epochs", 4, "--learning-rate", 0.01, "-o", out]
    assert run(*words).exit_code == 0
    return out


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_model_and_its_adapter_are_one_reference_in_every_stage(
    is_ours: bool, adapter: Path, aligned: Path, rows_file: Path, tokens_file: Path,
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str],
) -> None:  # fmt: skip
    if not is_ours:
        (adapter / "pact_offline.json").unlink()
    both, targets, out = f"{aligned}+{adapter}", tmp_path / "targets.json", tmp_path / "run"
    rows = ["--rows", rows_file, "--safety-tokens", tokens_file]
    scored = ["score", "--model", aligned, "--adapter", adapter, *rows, "--cache", tmp_path / "c",
              "--backend", "transformers", "--dtype", "float32", "-o", targets]  # fmt: skip
    result = run(*scored)
    assert result.exit_code == 0, result.output
    reference = locate_reference(both)
    assert {
        **locate_reference(str(aligned)).identity,
        "adapter": reference.identity["adapter"],
    } == (reference.identity)
    ids = torch.arange(7, 27)[None]
    policy = PeftModel.from_pretrained(load_model(str(aligned), "float32"), adapter)
    ours = load_model(str(reference.path), "float32")(ids).logits
    torch.testing.assert_close(ours, policy(ids).logits, rtol=1e-4, atol=1e-4)
    assert (ours - load_model(str(aligned), "float32")(ids).logits).abs().max() > 0.1
    assert "0 to score" in run(*scored).stderr  # known, under the other name too
    assert "0 to score" in run(*[*scored[:2], both, *scored[5:]]).stderr

    trained = ["finetune", *rows, "--targets", targets, "--batch-size", 4, "--epochs", 1,
               "--dtype", "float32", "--lora-dropout", 0, "-o", out]  # fmt: skip
    result = run(*trained, "--model", both)
    assert result.exit_code == 0, result.output
    first = json.loads((out / "training.jsonl").read_text().splitlines()[0])
    assert first["kl"] < 1e-4  # it begins as the reference
    assert "expected targets of the model" in fails(*trained, "--model", aligned)

    judged = ["evaluate", "--adapter", out, "--task", rows_file, "--dtype", "float32", "--name"]
    result = run(*judged, "run", "--model", both, "-o", tmp_path / "answers")
    assert result.exit_code == 0, result.output
    line = fails(*judged, "run", "--model", aligned, "-o", tmp_path / "no")
    assert "expected an adapter of" in line
    result = run("merge", "--model", both, "--adapter", out, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output


def test_models_that_were_added_up_are_listed_and_removed_when_long_not_used(
    adapter: Path, aligned: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert run("cache", "references").stdout == "no model is kept\n"
    both = f"{aligned}+{adapter}"
    place = locate_reference(both).path
    listed = run("cache", "references").stdout
    assert f"{place}: 0.00 GiB, used 0.0 days ago: {both}" in listed
    remove = ["cache", "references", "--remove", "--older-than", 7]
    assert "nothing to remove" in run(*remove, "--yes").stdout
    eight_days_ago = time.time() - 8 * 86400
    os.utime(place / "reference.json", (eight_days_ago, eight_days_ago))
    assert run(*remove).exit_code == 1  # no answer is no
    assert place.is_dir()
    locate_reference(both)  # used again
    assert "nothing to remove" in run(*remove, "--yes").stdout
    os.utime(place / "reference.json", (eight_days_ago, eight_days_ago))
    assert run(*remove, "--yes").stdout.endswith("removed\n")
    assert not place.exists()
    assert locate_reference(both).path == place
    assert place.is_dir()


def test_what_is_no_adapter_of_the_model_is_refused(
    adapter: Path, aligned: Path, base: Path, tmp_path: Path, rows_file: Path, tokens_file: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    words = ["score", "--rows", rows_file, "--safety-tokens", tokens_file, "--cache",
             tmp_path / "c", "-o", tmp_path / "t.json", "--model"]  # fmt: skip
    assert "expected an adapter of" in fails(*words, f"{base}+{adapter}")
    assert f"no such adapter directory: {tmp_path / 'gone'}" in fails(
        *words, f"{aligned}+{tmp_path / 'gone'}"
    )
    assert "expected a LoRA adapter, found a whole model" in fails(*words, f"{aligned}+{base}")
    (adapter / "adapter_model.safetensors").write_bytes(b"rubbish")
    assert "expected safetensors" in fails(*words, f"{aligned}+{adapter}")
    assert not (tmp_path / "t.json").exists()


@pytest.fixture
def theirs(adapter: Path) -> Path:
    """An adapter of somebody else's."""
    (adapter / "pact_offline.json").unlink()
    return adapter


def say(adapter: Path, **values: Any) -> None:
    """Change an adapter's config."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def ways(model: Any, adapter: Path, rows: Path, tokens: Path, folder: Path) -> list[list[Any]]:
    """What makes a reference of a model and an adapter, and what evaluates the adapter."""
    return [
        ["score", "--model", f"{model}+{adapter}", "--rows", rows, "--safety-tokens", tokens,
         "--cache", folder / "c", "--backend", "transformers", "-o", folder / "t.json"],
        ["evaluate", "--model", model, "--adapter", adapter, "--task", rows, "--name", "x",
         "--max-new-tokens", 2, "--dtype", "float32", "-o", folder / "out"],
    ]  # fmt: skip


@pytest.mark.parametrize("named", ["the path", "a copy", "a copy of other settings"])
def test_an_adapter_is_of_the_weights_that_its_config_names(
    named: str, theirs: Path, aligned: Path, base: Path, rows_file: Path, tokens_file: Path,
    tmp_path: Path, run: Callable[..., Result], fails: Callable[..., str],
) -> None:  # fmt: skip
    model = aligned
    if named != "the path":
        model = Path(shutil.copytree(aligned, tmp_path / "copy"))
    if named == "a copy of other settings":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    say(theirs, base_model_name_or_path=f"{aligned}/../{aligned.name}")
    for words in ways(model, theirs, rows_file, tokens_file, tmp_path):
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert "is not known" not in result.stderr
    for words in ways(base, theirs, rows_file, tokens_file, tmp_path):
        line = fails(*words)
        assert f"adapter_config.json: base_model_name_or_path: expected {base}, found '" in line
        assert line.endswith(f"another model; if it fits all the same, write {base} there")


@pytest.mark.parametrize("beside", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_beside_an_adapter_is_heeded_or_told(
    beside: str, theirs: Path, aligned: Path, rows_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    """Axolotl and LLaMA-Factory save the tokenizer that they trained with, template and all."""
    template = TEMPLATE.replace("assistant", "bot")
    text = template if beside.endswith("jinja") else json.dumps({"chat_template": template})
    (theirs / "chat_template.jinja").unlink()
    (theirs / beside).write_text(text)
    common = ["--rows", rows_file, "--objective", "none", "--epochs", 1, "--dtype", "float32"]
    out = tmp_path / "out"
    done = run("finetune", "--model", f"{aligned}+{theirs}", *common, "-o", out)
    assert done.exit_code == 0, done.output
    assert (out / "chat_template.jinja").read_text() == template
    (tmp_path / "its.jinja").write_text(template)
    words = [
        "evaluate",
        "--name",
        "x",
        "--model",
        aligned,
        "--adapter",
        theirs,
        "--task",
        rows_file,
    ]
    for more, told in (((), 1), (("--chat-template", tmp_path / "its.jinja"), 0)):
        done = run(*words, "--dtype", "float32", "--max-new-tokens", 1, *more,
                   "-o", tmp_path / f"evaluation{told}")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert done.stderr.count("--chat-template FILE takes it") == told


@pytest.mark.parametrize("named", ["owner/model", "/nowhere/model", "x" * 5000, "a\nb", "a\0b"])
def test_where_an_adapters_model_cannot_be_told_a_line_says_so(
    named: str, theirs: Path, aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    run: Callable[..., Result],
) -> None:  # fmt: skip
    say(theirs, base_model_name_or_path=named)
    for words in ways(aligned, theirs, rows_file, tokens_file, tmp_path):
        result = run(*words)
        assert result.exit_code == 0, result.output
        said = [line for line in result.stderr.splitlines() if "is not known" in line]
        assert len(said) == 1
        assert said[0].startswith(f"{theirs}: an adapter of {named[:3]!r}"[:-1])


@pytest.mark.parametrize(
    ("identity", "named", "is_known"),
    [
        ({"hub": "Owner/Model", "commit": "a"}, "owner/model@v2", True),
        ({"hub": "owner/model", "commit": "a"}, "owner/other", False),
        ({"hub": "owner/model", "commit": "a"}, "someone/model", None),
        ({"hub": "openai-community/gpt2", "commit": "a"}, "gpt2", None),
        ({"hub": "meta-llama/Llama-3-8B", "commit": "a"}, "unsloth/llama-3-8b-bnb-4bit", None),
        ({"hub": "owner/model", "commit": "a", "adapter": "b"}, "owner/model", None),
        ({"hub": "owner/model", "commit": "a"}, "/nowhere/model", None),
    ],
)
def test_names_of_the_hub_are_compared_as_the_hub_does(
    identity: dict[str, str], named: str, is_known: bool | None, theirs: Path, aligned: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    say(theirs, base_model_name_or_path=named)
    model = ModelFiles("owner/model@main", aligned, identity)
    if is_known is False:
        with pytest.raises(TargetsMismatchError, match="expected owner/model@main, found 'owner/o"):
            FineTuned.read(theirs).require_of(model)
    else:
        FineTuned.read(theirs).require_of(model)
    assert ("is not known" in caplog.text) == (is_known is None)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ({"hub": "new/name", "commit": "a"}, True),
        ({"hub": "OLD/Name", "commit": "a"}, True),
        ({"hub": "old/name", "commit": "b"}, False),
        ({"hub": "new/name", "commit": "a", "adapter": "c"}, False),
        ({"config.json": "a"}, False),
    ],
)
def test_a_model_that_the_hub_gives_by_another_name_is_the_same(
    other: dict[str, str], is_same: bool, theirs: Path, aligned: Path, targets: Path,
) -> None:  # fmt: skip
    """For what was trained from it, scored by it, and asked beside it."""
    before, model = {"hub": "old/name", "commit": "a"}, ModelFiles("new/name", aligned, other)
    keys = ("model", "model_identity", "settings", "metrics", "rows", "targets_sha256")
    facts = {**dict.fromkeys(keys), "model_identity": before, "settings": {}}
    (theirs / "pact_offline.json").write_text(json.dumps(facts))
    cache = TargetCache.open(targets)
    cache.binding = dataclasses.replace(
        cache.binding, identity=dataclasses.replace(cache.binding.identity, reference=before)
    )
    made, found = (MadeFrom({"evaluated": one}, {}, "t", "c") for one in (before, other))
    assert (made.difference(found) is None) == is_same
    for check in (FineTuned.read(theirs).require_of, cache.check_model):
        with nullcontext() if is_same else pytest.raises(TargetsMismatchError, match="expected"):
            check(model)


@pytest.mark.parametrize("what", ["a layer less", "a module more"])
def test_weights_that_fit_nothing_are_refused_before_a_model_is_loaded(
    what: str, theirs: Path, aligned: Path, rows_file: Path, tokens_file: Path, tmp_path: Path,
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, weights = aligned, theirs / "adapter_model.safetensors"
    if what == "a layer less":
        model = make_model(tmp_path / "m", num_hidden_layers=1)
        expected = "model.layers.1.self_attn.q_proj.lora_A.weight and 3 others"
    else:
        more = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        save_file({**load_file(weights), more: torch.ones(8, 64)}, weights)
        expected = more
    say(theirs, base_model_name_or_path=None)
    for place in ("pact_offline.models.load", "pact_offline.evaluation.subject"):
        monkeypatch.setattr(f"{place}.load_model", lambda *_: pytest.fail("a model was loaded"))
    for words in ways(model, theirs, rows_file, tokens_file, tmp_path):
        line = fails(*words)
        assert f"{weights}: expected weights of what adapter_config.json names and" in line
        assert line.endswith(expected)
    with pytest.raises(InputError, match="expected weights of what"):
        FineTuned.read(theirs).added_to(load_model(str(model), "float32"))


@pytest.mark.parametrize(
    "said", [{"init_lora_weights": "pissa_niter_4"}, {"layer_replication": [[0, 2], [1, 2]]}]
)
def test_an_adapter_that_peft_cannot_give_back_is_refused(
    said: dict[str, Any], theirs: Path, aligned: Path, rows_file: Path, tokens_file: Path,
    tmp_path: Path, fails: Callable[..., str],
) -> None:  # fmt: skip
    """One takes other numbers from the model at every load, one makes a model of other layers."""
    say(theirs, **said)
    for words in ways(aligned, theirs, rows_file, tokens_file, tmp_path):
        assert f"adapter_config.json: {next(iter(said))}: expected" in fails(*words)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changes_the_models_weights_is_loaded_as_it_was_made(
    kind: str, aligned: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=kind)
    made = get_peft_model(load_model(str(aligned), "float32"), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(str(tmp_path / kind))
    ids = torch.arange(7, 27)[None]
    reference = locate_reference(f"{aligned}+{tmp_path / kind}")
    ours = load_model(str(reference.path), "float32")(ids).logits
    torch.testing.assert_close(ours, made.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_sum_that_does_not_load_as_it_was_is_not_kept(
    adapter: Path, aligned: Path, tmp_path: Path, fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def save(model: Any, folder: Path, **options: Any) -> None:
        saved(model, folder, state_dict={**model.state_dict(), "extra": torch.ones(1)}, **options)

    saved = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    line = fails("merge", "--model", aligned, "--adapter", adapter, "-o", tmp_path / "merged")
    told = f"{aligned}: expected what is saved to load again as it was, found extra, which it has"
    assert told in line
    assert not [*tmp_path.glob("*merged*")]
    with pytest.raises(ModelError, match="has no place for"):
        locate_reference(f"{aligned}+{adapter}")
    assert not [*(tmp_path / "home").rglob("*.safetensors")]

    def fail(*_: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    line = fails("merge", "--model", aligned, "--adapter", adapter, "-o", tmp_path / "merged")
    assert "its sum cannot be saved: Error while serializing: I/O error: No space left" in line


def test_a_model_with_a_plus_in_its_name_is_itself(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "a+b")
    assert split_adapter(str(tmp_path / "a+b")) == (str(tmp_path / "a+b"), None)
    assert locate_reference(str(tmp_path / "a+b")).path == tmp_path / "a+b"
    assert split_adapter("owner/name@v1") == ("owner/name@v1", None)

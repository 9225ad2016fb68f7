"""A policy whose weights processes share (FSDP): the losses and the result of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pact_offline.errors import ModelError
from pact_offline.models.load import load_model
from pact_offline.models.saved import adapter_alone, adapter_weights, require_adapter_saved

FSDP = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: FULL_STATE_DICT
num_processes: 2
use_cpu: true
"""
SCRIPT = Path(__file__).with_name("fsdp_on_cpu.py")


def sharded(*words: Any, config: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as two processes that share the weights."""
    config.write_text(FSDP, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return subprocess.run(
        [*launcher, "--main_process_port", str(port), str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("options", [[], ["--lora-modules", "all-linear", "--lora-dora"],
                                     ["--method", "full"]])  # fmt: skip
def test_it_trains_as_one_process_does_and_is_loaded_again(
    options: list[Any], command: list[Any], tmp_path: Path, run: Callable[..., Result]
) -> None:
    common = [*command, *options, "--row-order", "as_given"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*common, "-o", one).exit_code == 0
    done = sharded(*common, "--batch-size", 2, "-o", two, config=tmp_path / "fsdp.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("FSDP") == 2
    steps = [
        [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    for ours, theirs in zip(*steps, strict=True):
        for name in ("loss", "cross_entropy", "kl", "confidence_gap"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), name
    (file,) = (path.name for path in one.glob("*.safetensors"))
    expected, found = (load_file(path / file) for path in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-3, atol=2e-4)


def test_an_adapter_that_would_load_otherwise_is_refused(aligned: Path, tmp_path: Path) -> None:
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"])
    policy = get_peft_model(load_model(str(aligned), "float32"), config)
    weights = adapter_weights(policy.state_dict())
    policy.save_pretrained(tmp_path)
    require_adapter_saved(tmp_path, weights, adapter_alone(policy, weights), "m")
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    first = sorted(saved)[0]
    save_file(saved | {first: saved[first] + 1}, file)
    with pytest.raises(ModelError, match=r"load again as it was, found another .*lora_A"):
        require_adapter_saved(tmp_path, weights, adapter_alone(policy, weights), "m")
    save_file({name: value for name, value in saved.items() if name != first}, file)
    with pytest.raises(ModelError, match=r"found none of .*lora_A"):
        require_adapter_saved(tmp_path, weights, adapter_alone(policy, weights), "m")

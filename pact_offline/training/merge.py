"""`merge`: an adapter and its model become one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pact_offline.errors import InputError, TargetsMismatchError, first_line
from pact_offline.files import read_json, write_json
from pact_offline.folders import RUN_FILE, output_aside
from pact_offline.models.load import load_model
from pact_offline.models.locate import ModelFiles
from pact_offline.rows.chat import load_tokenizer
from pact_offline.settings.stages import Dtype
from pact_offline.training.model_card import model_card


def merge(model: ModelFiles, adapter: Path, output: Path, dtype: Dtype) -> None:
    """Add an adapter to its model in fp32, and write the result in `dtype`.

    Raises:
        MissingFileError, InputError: not an adapter of `finetune`.
        TargetsMismatchError: the adapter is of another model.
    """
    facts = _read_facts(adapter)
    if facts["model_identity"] != model.identity:
        raise TargetsMismatchError(
            f"{adapter}: expected an adapter of {model.name}, found one of {facts['model']}, or "
            "of other weights"
        )
    with output_aside(output) as aside:
        from peft import PeftModel

        try:
            policy = PeftModel.from_pretrained(load_model(str(model.path), "float32"), str(adapter))
        except (ValueError, OSError) as error:
            raise InputError(f"{adapter}: cannot be loaded: {first_line(error)}") from None
        merged = policy.merge_and_unload().to(getattr(torch, dtype))
        merged.save_pretrained(aside, safe_serialization=True)
        load_tokenizer(str(model.path)).save_pretrained(aside)
        settings = {**facts["settings"], "method": "full"}  # what the card says it is now
        card = model_card({**facts, "settings": settings})
        (aside / "README.md").write_text(card, encoding="utf-8")
        write_json(aside / RUN_FILE, {**facts, "merged_from": str(adapter)})


def _read_facts(adapter: Path) -> dict[str, Any]:
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: expected an adapter from `pact-offline finetune`, found none")
    path = adapter / RUN_FILE
    facts = read_json(path)
    for key in ("model", "model_identity", "settings", "metrics", "rows", "targets_sha256"):
        if not isinstance(facts, dict) or key not in facts:
            raise InputError(f"{path}: {key}: required key is missing")
    return dict(facts)

"""What `finetune` and `merge` write, read again: an adapter or a whole model, with its run."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, MissingFileError, TargetsMismatchError, first_line
from pact_offline.files import read_json, sha256_file
from pact_offline.folders import RUN_FILE
from pact_offline.models.locate import ModelFiles, locate_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTS = ("model", "model_identity", "settings", "metrics", "rows", "targets_sha256")


@dataclass(frozen=True)
class FineTuned:
    """A LoRA adapter, or a model that was trained whole or merged.

    Attributes:
        folder: where it is.
        is_whole: whether it is a model by itself.
        facts: its `pact_offline.json`; None where something else than `finetune` made it.
        sha256: over its files, 64 hex digits.
    """

    folder: Path
    is_whole: bool
    facts: dict[str, Any] | None
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> FineTuned:
        """Look at a folder; nothing is loaded.

        Raises:
            MissingFileError: there is none.
            InputError: it holds neither, or its weights are no safetensors.
        """
        if not folder.is_dir():
            raise MissingFileError(f"{folder}: no such adapter directory")
        is_whole = (folder / "config.json").is_file() and not (folder / CONFIG).is_file()
        if is_whole:
            files = locate_model(str(folder)).identity
        else:
            _require_lora(folder)
            files = {name: sha256_file(folder / name) for name in (CONFIG, WEIGHTS)}
        text = "".join(f"{name} {checksum}\n" for name, checksum in sorted(files.items()))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(folder, is_whole, read_facts(folder), digest)

    def require_of(self, model: ModelFiles) -> None:
        """Refuse what was trained from another model; what `finetune` did not make says nothing.

        Raises:
            TargetsMismatchError: it was.
        """
        if self.facts is not None and self.facts["model_identity"] != model.identity:
            raise TargetsMismatchError(
                f"{self.folder}: expected an adapter of {model.name}, found one of "
                f"{self.facts['model']}, or of other weights"
            )

    def added_to(self, model: Any) -> Any:
        """The model with the adapter, in eval mode: merged in, but not into weights in few bits,
        which would be rounded again, or embeddings that are the LM head too, as both would change.

        Raises:
            InputError: peft cannot load it, or it lacks weights for the modules that it names.
        """
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                policy = PeftModel.from_pretrained(model, str(self.folder))
                if not any(isinstance(module, LoraLayer) for module in policy.modules()):
                    raise ValueError(f"{CONFIG} names no module of the model")
                is_partial = any("missing adapter keys" in str(one.message) for one in said)
                stays = getattr(model, "is_quantized", False) or _adapts_tied(policy)
                merged = policy.eval() if stays else policy.merge_and_unload().eval()
            except Exception as error:  # peft raises of all kinds
                raise InputError(
                    f"{self.folder}: expected a peft adapter, found: {first_line(error)}"
                ) from None
        if is_partial:
            raise InputError(
                f"{self.folder / WEIGHTS}: expected weights of every module that {CONFIG} names, "
                "found modules without"
            )
        return merged


def _adapts_tied(policy: Any) -> bool:
    """Whether an adapter is on embeddings, or an LM head, that are one weight."""
    from peft.tuners.lora import LoraLayer

    model = policy.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(end, "base_layer", end).weight for end in ends if end is not None]
    is_tied = len(weights) > 1 and weights[0] is weights[1]
    return is_tied and any(isinstance(end, LoraLayer) for end in ends)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `finetune` wrote of the run that made a folder; None where it made none.

    Raises:
        InputError: names the key that is missing.
    """
    path = folder / RUN_FILE
    facts = read_json(path) if path.is_file() else None
    if not isinstance(facts, dict) or "model_identity" not in facts:
        return None
    for key in _FACTS:
        if key not in facts:
            raise InputError(f"{path}: {key}: required key is missing")
    if not isinstance(facts["settings"], dict):
        raise InputError(f"{path}: settings: expected keys and values, found {facts['settings']!r}")
    return facts


def _require_lora(folder: Path) -> None:
    """Refuse what is no LoRA adapter in safetensors: pickled weights would run code."""
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder}: expected a peft adapter ({CONFIG}), or a model (config.json), found neither"
        )
    if not (folder / WEIGHTS).is_file():
        found = sorted(path.name for path in folder.glob("adapter_model*"))
        raise InputError(
            f"{folder}: expected weights as {WEIGHTS}, found {', '.join(found) or 'none'}; no "
            "other form is loaded"
        )
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type: expected 'LORA', found {kind!r:.40}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as weights:
            names = list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{folder / WEIGHTS}: expected safetensors, found: {first_line(error)}"
        ) from None
    if not any("lora_" in name for name in names):
        raise InputError(f"{folder / WEIGHTS}: expected LoRA weights, found none")

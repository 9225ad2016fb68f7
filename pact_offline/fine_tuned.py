"""What `finetune` and `merge` write, read again: an adapter or a whole model, with its run."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import (
    InputError,
    MissingFileError,
    PactError,
    TargetsMismatchError,
    first_line,
)
from pact_offline.files import read_json, read_text, sha256_file
from pact_offline.folders import RUN_FILE
from pact_offline.models.locate import (
    ModelFiles,
    hub_name,
    is_same_model,
    locate_model,
    looks_like_path,
    weight_checksums,
)

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_COPY = re.compile(r"^meta-|(-unsloth)?(-bnb)?-4bit$|-(awq|gptq)(-int4)?$")
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
        """Look at a folder and, of an adapter, at its weights; no model is loaded.

        Raises:
            MissingFileError: there is none.
            InputError: it holds neither, or its weights are no safetensors or not finite.
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

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """What a tokenizer beside it was saved with; of several, each by its name."""
        file, config = self.folder / "chat_template.jinja", self.folder / "tokenizer_config.json"
        if file.is_file():
            others = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
            named = {other.stem: read_text(other) for other in others}
            return {"default": read_text(file), **named} if named else read_text(file)
        value = read_json(config) if config.is_file() else None
        template = value.get("chat_template") if isinstance(value, dict) else None
        return template if isinstance(template, str) else None

    def require_of(self, model: ModelFiles) -> None:
        """Refuse what was trained from another model.

        Of an adapter that `finetune` did not make, its config names the model, and its weights have
        to fit. Such a whole model says nothing.

        Raises:
            TargetsMismatchError: it was.
            InputError: an adapter has weights that fit nothing in the model.
        """
        if self.facts is not None:
            if not is_same_model(self.facts["model_identity"], model.identity):
                raise TargetsMismatchError(
                    f"{self.folder}: expected an adapter of {model.name}, found one of "
                    f"{self.facts['model']}, or of other weights"
                )
        elif not self.is_whole:
            self._require_named(model)
            self._require_fitting(model)

    def _require_named(self, model: ModelFiles) -> None:
        """Refuse an adapter whose config names another model, or warn where that is not proven."""
        named = read_json(self.folder / CONFIG).get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            return
        is_same = _is_name_of(named, model)
        if is_same is None:
            log.warning(
                "%s: an adapter of %.200r, as its config says; whether %s has the same weights is "
                "not known",
                self.folder,
                named,
                model.name,
            )
        elif not is_same:
            raise TargetsMismatchError(
                f"{self.folder / CONFIG}: base_model_name_or_path: expected {model.name}, found "
                f"{named!r:.200}, another model; if it fits all the same, write {model.name} there"
            )

    def _require_fitting(self, model: ModelFiles) -> None:
        """Refuse weights that fit nothing, before the model's own are loaded: vLLM tells none."""
        from pact_offline.models.load import empty_model

        try:
            with warnings.catch_warnings(action="ignore"):
                _, unfitting = self._on(empty_model(str(model.path)))[1]
        except Exception:  # of a model that cannot be made without weights, `added_to` will tell
            return
        self._require_none_of(unfitting)

    def _require_none_of(self, unfitting: list[str]) -> None:
        if unfitting:
            raise InputError(
                f"{self.folder / WEIGHTS}: expected weights of what {CONFIG} names and the model "
                f"has, found {unfitting[0]}{_and_others(unfitting)}"
            )

    def _on(self, model: Any) -> tuple[Any, tuple[list[str], list[str]]]:
        """The model with the adapter; the weights that it lacks, and those that fit nothing."""
        from peft import PeftModel

        policy = PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
        found = policy.load_adapter(  # again: only so does peft say what it found
            str(self.folder),
            "default",
            torch_device="cpu",
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )
        return policy, (list(found.missing_keys), list(found.unexpected_keys))

    def added_to(self, model: Any) -> Any:
        """The model with the adapter, in eval mode: merged in, but not into weights in few bits,
        which would be rounded again, or embeddings that are the LM head too, as both would change.

        Raises:
            InputError: peft cannot load it, or it lacks weights for the modules that it names, or
                has others.
        """
        from peft.tuners.lora import LoraLayer

        try:
            with warnings.catch_warnings(action="ignore"):
                policy, (missing, unfitting) = self._on(model)
                if not any(isinstance(module, LoraLayer) for module in policy.modules()):
                    raise ValueError(f"{CONFIG} names no module of the model")
                stays = getattr(model, "is_quantized", False) or _adapts_tied(policy)
                merged = policy.eval() if stays else policy.merge_and_unload().eval()
        except Exception as error:  # peft raises of all kinds
            raise InputError(
                f"{self.folder}: expected a peft adapter, found: {first_line(error)}"
            ) from None
        if missing:
            raise InputError(
                f"{self.folder / WEIGHTS}: expected weights of every module that {CONFIG} names, "
                f"found none of {missing[0]}{_and_others(missing)}"
            )
        self._require_none_of(unfitting)
        return merged


def _is_name_of(named: str, model: ModelFiles) -> bool | None:
    """Whether the name in an adapter's config is that of a model; None where nothing shows it.

    Weights are compared where both are folders, names where both are of the hub, whatever the
    revision. Another owner's copy, also in few bits, has the same name but for that. A model that
    was added up has neither.
    """
    identity, folder = model.identity, Path(named)
    is_plain, is_of_hub = "adapter" not in identity, "hub" in identity
    try:
        if not looks_like_path(named):
            ours, theirs = hub_name(named)[0].lower(), identity.get("hub", "").lower()
            if not (is_plain and is_of_hub) or (ours != theirs and _bare(ours) == _bare(theirs)):
                return None
            return ours == theirs
        if folder.resolve() == model.path.resolve():
            return True
        if not is_plain or is_of_hub:
            return None
        return _weights(weight_checksums(folder)) == _weights(identity)
    except (PactError, OSError, ValueError):  # it is not there, no model, or no path at all
        return None


def _bare(name: str) -> str:
    """The name of a hub's model without its owner, and of a copy in few bits that of the model."""
    return _COPY.sub("", name.rpartition("/")[2])


def _weights(checksums: dict[str, str]) -> list[str]:
    return sorted(value for name, value in checksums.items() if name != "config.json")


def _is_finite(value: Any) -> bool:
    """Whether a tensor is, looked at in parts: of few bits each is made float32."""
    return all(part.float().isfinite().all() for part in value.flatten().split(1 << 22))


def _and_others(keys: list[str]) -> str:
    return f" and {len(keys) - 1} others" if keys[1:] else ""


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
    for key in ("settings", "model_identity"):
        if not isinstance(facts[key], dict):
            raise InputError(f"{path}: {key}: expected keys and values, found {facts[key]!r:.60}")
    return facts


def _require_lora(folder: Path) -> None:
    """Refuse what is no LoRA adapter in safetensors (pickled weights would run code), or holds
    weights that are not finite."""
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
    if (start := str(config.get("init_lora_weights"))).startswith("pissa_niter"):
        raise InputError(
            f"{folder / CONFIG}: init_lora_weights: expected a kind that takes the same from the "
            f"model at every load, found {start!r:.40}; convert it by peft "
            "(path_initial_model_for_weight_conversion)"
        )
    if layers := config.get("layer_replication"):
        raise InputError(
            f"{folder / CONFIG}: layer_replication: expected none, as it makes a model of other "
            f"layers, found {layers!r:.40}"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            names = list(weights.keys())
            broken = [name for name in names if not _is_finite(weights.get_tensor(name))]
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's own, of a dtype it lacks
        raise InputError(
            f"{folder / WEIGHTS}: expected safetensors, found: {first_line(error)}"
        ) from None
    if not any("lora_" in name for name in names):
        raise InputError(f"{folder / WEIGHTS}: expected LoRA weights, found none")
    if broken:
        raise InputError(
            f"{folder / WEIGHTS}: expected finite weights, found others in {broken[0]}"
            f"{_and_others(broken)}"
        )

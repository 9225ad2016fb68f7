"""Safe LoRA (arXiv 2405.16833): a trained adapter, projected onto what alignment has changed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pact_offline.errors import InputError, ModelError
from pact_offline.files import read_json, write_json
from pact_offline.fine_tuned import CONFIG, WEIGHTS, FineTuned
from pact_offline.folders import RUN_FILE, output_aside
from pact_offline.models.load import load_model
from pact_offline.models.locate import ModelFiles
from pact_offline.provenance import provenance
from pact_offline.references import own_dtype
from pact_offline.settings.stages import SafeLoraSettings
from pact_offline.training.model_card import model_card

log = logging.getLogger(__name__)

_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


class Projection(NamedTuple):
    """An adapter's update of one module, projected.

    Attributes:
        lora_b: C B, of the dtype of B, [out, rank].
        similarity: cosine of the updates C B A and B A, as vectors; 0 where one of them is zero.
    """

    lora_b: Tensor
    similarity: float


def project(lora_a: Tensor, lora_b: Tensor, change: Tensor) -> Projection:
    """Project an update B A by C = V V^T / |V|, the authors' fast form, with Frobenius' norm.

    Computed in float64, and with no matrix larger than V. Where V is zero, so is C.

    Args:
        lora_a: A, [rank, in].
        lora_b: B, [out, rank].
        change: V, the aligned model's weight less its base model's, [out, in].
    """
    a, b, v = lora_a.double(), lora_b.double(), change.double()
    size = v.norm()
    projected = v @ (v.T @ b) / size if size > 0 else torch.zeros_like(b)
    inner = a @ a.T  # of two updates X A and Y A the product is the sum of X^T Y times this

    def product(x: Tensor, y: Tensor) -> float:
        return float(((x.T @ y) * inner).sum())

    sizes = (product(projected, projected) * product(b, b)) ** 0.5
    similarity = product(projected, b) / sizes if sizes > 0 else 0.0
    return Projection(projected.to(lora_b.dtype), similarity)


def safe_lora(
    model: ModelFiles, base: ModelFiles, adapter: Path, output: Path, settings: SafeLoraSettings
) -> dict[str, Any]:
    """Write a trained LoRA adapter with its least similar modules projected.

    Both models are held in memory, on the CPU, in their own dtype.

    Args:
        model: the aligned one, which the adapter is of.
        base: its base model.
        adapter: directory of the adapter.
        output: directory to write.
        settings: which modules are projected.

    Returns:
        what is written to `pact_offline.json`: the facts of the adapter, and `safe_lora`, with
        `similarity` by module and the modules that are `projected`.

    Raises:
        MissingFileError, InputError: not a LoRA adapter of `finetune`, or one of a kind whose
            update is not B A.
        TargetsMismatchError: the adapter is of another model.
        ModelError: the two models have no such modules, or of other shapes.
    """
    tuned = FineTuned.read(adapter)
    if tuned.facts is None or tuned.is_whole:
        raise InputError(
            f"{adapter}: expected a LoRA adapter from `pact-offline finetune`, found "
            f"{'a whole model' if tuned.is_whole else f'one with none of its {RUN_FILE}'}"
        )
    if "safe_lora" in tuned.facts:
        raise InputError(f"{adapter}: expected an adapter as it was trained, found a projected one")
    tuned.require_of(model)
    weights = load_file(adapter / WEIGHTS)
    modules = _modules(weights, adapter)
    changes = _Changes(model, base)
    found, untouched = {}, 0
    for name in modules:
        change = changes.of(name)
        untouched += not change.any()
        lora_a, lora_b = (weights[_PREFIX + name + end] for end in (_A, _B))
        found[name] = project(lora_a, lora_b, change)
    projected = chosen(found, settings)
    for name in projected:
        weights[_PREFIX + name + _B] = found[name].lora_b.contiguous()
    if untouched:
        log.warning(
            "%d of %d adapted modules have the same weights in %s and %s: projected, their update "
            "is nothing",
            untouched,
            len(modules),
            model.name,
            base.name,
        )
    facts = {
        **tuned.facts,
        "settings": {**tuned.facts["settings"], "safe_lora": settings.model_dump(mode="json")},
        "safe_lora": {
            "base": base.name,
            "base_identity": base.identity,
            "similarity": {name: one.similarity for name, one in found.items()},
            "projected": projected,
        },
        "projected_from": str(adapter),
        "provenance": provenance(),
    }
    with output_aside(output) as aside:
        for file in adapter.iterdir():
            if file.is_file():
                shutil.copy(file, aside)
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / "README.md").write_text(model_card(facts), encoding="utf-8")
        write_json(aside / RUN_FILE, facts)
    return facts


def chosen(found: dict[str, Projection], settings: SafeLoraSettings) -> list[str]:
    """The modules to project: at most so similar, or the least similar ones."""
    order = sorted(found, key=lambda name: found[name].similarity)
    if settings.modules is not None:
        return order[: settings.modules]
    return [name for name in order if found[name].similarity <= settings.threshold]


def _modules(weights: dict[str, Tensor], adapter: Path) -> list[str]:
    """Names of the adapted modules, where all that is trained is an update B A of each."""
    config = read_json(adapter / CONFIG)
    kinds = {"use_dora": "DoRA", "target_parameters": "an adapter of experts"}
    for key, kind in kinds.items():
        if config.get(key):
            raise InputError(f"{adapter}: expected plain LoRA, whose update is B A, found {kind}")
    names = [key.removeprefix(_PREFIX).removesuffix(_B) for key in weights if key.endswith(_B)]
    known = {_PREFIX + name + end for name in names for end in (_A, _B)}
    if odd := sorted(set(weights) ^ known):
        raise InputError(
            f"{adapter / WEIGHTS}: expected LoRA of linear modules alone, found {odd[0]}"
        )
    return names


class _Changes:
    """What alignment has changed, module by module."""

    def __init__(self, model: ModelFiles, base: ModelFiles) -> None:
        self._names = (model.name, base.name)
        cpu = torch.device("cpu")
        self._pair = []
        for files in (model, base):
            dtype = str(own_dtype(files.path)).removeprefix("torch.")
            loaded = load_model(str(files.path), dtype, device=cpu)
            if getattr(loaded, "is_quantized", False):
                raise ModelError(
                    f"{files.name}: expected weights that are not quantised, found some that are"
                )
            self._pair.append(dict(loaded.named_modules()))

    def of(self, name: str) -> Tensor:
        """A linear module's weight, aligned less base, [out, in]."""
        weights = []
        for label, modules in zip(self._names, self._pair, strict=True):
            module = modules.get(name)
            if not isinstance(module, torch.nn.Linear | Conv1D):
                raise ModelError(f"{label}: expected a linear module {name}, found none")
            weight = module.weight.detach().float()
            weights.append(weight.T if isinstance(module, Conv1D) else weight)
        aligned, base = weights
        if aligned.shape != base.shape:
            raise ModelError(
                f"{self._names[1]}: {name}: expected the shape {[*aligned.shape]} of "
                f"{self._names[0]}, found {[*base.shape]}"
            )
        return aligned - base

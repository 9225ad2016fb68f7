"""A reference: a model as it is, or one with a LoRA adapter added up."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_offline.errors import InputError, ModelError, PactError, first_line
from pact_offline.files import read_json, user_cache
from pact_offline.fine_tuned import FineTuned
from pact_offline.folders import output_aside
from pact_offline.models.locate import ModelFiles, locate_model, split_adapter, weight_checksums

log = logging.getLogger(__name__)

_MARK = "reference.json"  # tells an earlier one


def locate_reference(model: str) -> ModelFiles:
    """`locate_model`, also of MODEL+ADAPTER: a model with a LoRA adapter that is part of it.

    The two are added up once, in fp32, and kept in this user's cache in the model's own dtype, so
    that every engine takes the sum for a model like any other. Its identity is that of both.

    Raises:
        MissingFileError, ModelError, InputError: either is not there, or no such thing.
        TargetsMismatchError: `finetune` made the adapter of another model.
    """
    name, adapter = split_adapter(model)
    files = locate_model(name)
    if adapter is None:
        return files
    tuned = FineTuned.read(Path(adapter))
    if tuned.is_whole:
        raise InputError(f"{adapter}: expected a LoRA adapter, found a whole model")
    tuned.require_of(files)
    identity = {**files.identity, "adapter": tuned.sha256}
    parts = [identity, tuned.chat_template]  # weights are who it is, the template comes with it
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    place = _kept() / digest[:16]
    if (place / _MARK).is_file():
        with suppress(OSError):  # another user's
            os.utime(place / _MARK)  # when it was used, for `kept_references`
    else:
        log.info("%s: adding up the model and its adapter, kept as %s", model, place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with output_aside(place, _MARK) as aside:
            save_merged(files, tuned, aside)
            told = {"model": model, "identity": identity}
            (aside / _MARK).write_text(json.dumps(told), encoding="utf-8")
    return ModelFiles(model, place, identity, weight_checksums(place))


@dataclass(frozen=True)
class KeptReference:
    """A model with its adapter added up, in this user's cache.

    Attributes:
        name: as it was asked for.
        folder: where it is.
        size: bytes.
        used: when it was last asked for, in seconds since the epoch.
    """

    name: str
    folder: Path
    size: int
    used: float


def kept_references() -> list[KeptReference]:
    """All that this user's cache holds, in the order of their use."""
    found = []
    for mark in _kept().glob(f"*/{_MARK}"):
        with suppress(OSError, PactError):  # removed meanwhile, or not to be read
            told = read_json(mark)
            name = str(told.get("model", "unknown")) if isinstance(told, dict) else "unknown"
            size = sum(file.stat().st_size for file in mark.parent.rglob("*") if file.is_file())
            found.append(KeptReference(name, mark.parent, size, mark.stat().st_mtime))
    return sorted(found, key=lambda one: one.used)


def remove_reference(kept: KeptReference) -> None:
    """Remove one; its mark goes first, so that a half removed one is made anew."""
    (kept.folder / _MARK).unlink(missing_ok=True)
    shutil.rmtree(kept.folder, ignore_errors=True)


def _kept() -> Path:
    return user_cache() / "references"


def save_merged(
    model: ModelFiles, tuned: FineTuned, folder: Path, dtype: str | None = None
) -> None:
    """Write a model with an adapter added up in fp32, and its tokenizer, as a model.

    Args:
        model: without the adapter.
        tuned: the adapter, or the whole model that counts instead; its chat template, where it has
            one, is the result's.
        folder: that exists.
        dtype: of the result; None: the model's own.

    Raises:
        ModelError: the model is quantised, the adapter is of tied embeddings, the generation
            config or the weights cannot be saved, or do not load again as they were.
        InputError: peft cannot load the adapter.
    """
    import torch

    from pact_offline.models.load import load_model, make_savable
    from pact_offline.models.saved import require_model_saved
    from pact_offline.rows.tokenizer import load_tokenizer

    loaded: Any = load_model(str(tuned.folder if tuned.is_whole else model.path), "float32")
    if getattr(loaded, "is_quantized", False):
        raise ModelError(
            f"{model.name}: expected a model whose weights are not quantised to merge into; use "
            "the adapter as it is"
        )
    merged = loaded if tuned.is_whole else tuned.added_to(loaded)
    if hasattr(merged, "peft_config"):
        raise ModelError(
            f"{tuned.folder}: expected an adapter that can be added up, found one of embeddings "
            f"that are the LM head of {model.name} too; use it as it is"
        )
    make_savable(merged, model.name)
    kept = getattr(torch, dtype) if dtype else own_dtype(model.path)
    with _told_where_it_cannot_be_saved(model):
        merged.to(kept).save_pretrained(folder, safe_serialization=True)
    require_model_saved(folder, merged.state_dict(), model.name)
    tokenizer = load_tokenizer(str(model.path))
    if (template := tuned.chat_template) is not None:  # what it was trained with
        tokenizer.chat_template = template
    with _told_where_it_cannot_be_saved(model):
        tokenizer.save_pretrained(folder)


@contextmanager
def _told_where_it_cannot_be_saved(model: ModelFiles) -> Iterator[None]:
    """On a full disk safetensors and tokenizers raise errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"{model.name}: its sum cannot be saved: {first_line(error)}") from None


def own_dtype(folder: Path) -> Any:
    """The torch dtype that a model's weights are saved in; float32 where its config says none."""
    import torch
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    return found if isinstance(found, torch.dtype) else torch.float32

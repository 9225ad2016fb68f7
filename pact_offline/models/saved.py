"""What was saved: loaded again and compared before anybody relies on it, or left where it fails."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pact_offline.errors import InputError, ModelError, first_line
from pact_offline.models.load import model_class
from pact_offline.models.locate import why_not_loaded

PLAIN = "trained.safetensors"
_OF_ADAPTER = re.compile(r".*\.lora_\w+\.default(\..*)?")


def adapter_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of what a policy's state has of its adapter."""
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if _OF_ADAPTER.fullmatch(name)
    }


def require_model_saved(folder: Path, weights: Mapping[str, torch.Tensor], model: str) -> None:
    """Refuse a saved model that does not load with the weights that were to be saved.

    Its files are mapped into memory; only weights that its family joins are copied.

    Args:
        folder: where it was saved.
        weights: its state, by the names of its modules.
        model: its name, for messages.

    Raises:
        ModelError: says which weight is missing, left over, or another.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        again, found = model_class(config).from_pretrained(
            folder,
            dtype=next(value.dtype for value in weights.values() if value.is_floating_point()),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise _not_as_saved(model, why_not_loaded(error)) from None
    state = again.state_dict()
    missing = found["missing_keys"] | (set(weights) - set(state))
    _require_same(model, weights, state, missing, found["unexpected_keys"])


def require_adapter_saved(
    folder: Path, weights: Mapping[str, torch.Tensor], policy: Any, model: str
) -> None:
    """`require_model_saved` of an adapter, which is loaded into its own policy.

    Args:
        folder: where it was saved.
        weights: of `adapter_weights`.
        policy: that was trained, whole in this process, or `adapter_alone` of it.
        model: its name, for messages.

    Raises:
        ModelError: says which weight is missing, left over, or another.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        found = set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # peft and torch raise of all kinds
        raise _not_as_saved(model, first_line(error)) from None
    state = dict(policy.named_parameters())
    missing = set(weights) & set(found.missing_keys) | (set(weights) - set(state))
    _require_same(model, weights, state, missing, set(found.unexpected_keys))


def adapter_alone(policy: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A policy whose adapter is zeros and whose model is on the meta device.

    Args:
        policy: whose weights processes share.
        weights: of `adapter_weights`.
    """
    from peft import get_peft_model

    with torch.device("meta"):
        config = policy.get_base_model().config
        empty = model_class(config).from_config(config, trust_remote_code=False)
        alone = get_peft_model(empty, policy.peft_config["default"])
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    alone.load_state_dict(zeros, strict=False, assign=True)
    return alone


def _require_same(
    model: str,
    weights: Mapping[str, torch.Tensor],
    again: Mapping[str, torch.Tensor],
    missing: set[str],
    unexpected: set[str],
) -> None:
    if missing:
        raise _not_as_saved(model, f"none of {_first_of(missing)}")
    if unexpected:
        raise _not_as_saved(model, f"{_first_of(unexpected)}, which it has no place for")
    others = {name for name, value in weights.items() if not _is_same(value, again[name])}
    if others:
        raise _not_as_saved(model, f"another {_first_of(others)}")


def _first_of(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first}{f' and {len(others)} others' if others else ''}"


def _not_as_saved(model: str, found: str) -> ModelError:
    return ModelError(f"{model}: expected what is saved to load again as it was, found {found}")


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit, in the dtype of the first; some modules are loaded in fp32 whatever is asked."""
    if one.shape != other.shape:
        return False
    ours, theirs = one.detach().cpu(), other.detach().to("cpu", one.dtype)
    return torch.equal(_bytes(ours), _bytes(theirs))


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)


@contextmanager
def weights_left(weights: Mapping[str, torch.Tensor], folder: Path, output: Path) -> Iterator[None]:
    """Leave weights as plain safetensors where a block fails to save them.

    They go to the folder in place of what the block wrote of them, or among temporary files where
    they do not fit. What the block wrote goes only once they are somewhere: it may be whole.

    Args:
        weights: by the names of their modules.
        folder: that the block writes to.
        output: where that will be in the end.

    Raises:
        InputError: the block failed; says why, and where the weights are.
    """
    try:
        yield
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise InputError(f"{reason} ({_leave(weights, folder, output)})") from error


def _leave(weights: Mapping[str, torch.Tensor], folder: Path, output: Path) -> str:
    """Say where the weights are."""
    apart = {(value.data_ptr(), value.shape): name for name, value in weights.items()}
    plain = {name: _alone(weights[name]) for name in apart.values()}  # tied: once
    written = [*folder.glob("*.safetensors*")]
    found = None
    for place in (folder, None):
        try:
            inside = place or Path(tempfile.mkdtemp(prefix=f"{output.name}.unsaved."))
            _save_whole(plain, inside / PLAIN)
        except Exception as error:  # nothing may hide why this is needed
            found = first_line(error)
            continue
        for half in written:
            half.unlink()
        return f"the weights are left as {PLAIN if place else inside / PLAIN}"
    return f"what was saved of the weights is left, and may not be whole: {found}"


def _alone(value: torch.Tensor) -> torch.Tensor:
    """A tensor that is no part of another's memory, as safetensors wants it."""
    value = value.detach().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _save_whole(weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(weights, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise

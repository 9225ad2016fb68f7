"""Which modules of a model get a LoRA adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pact_offline.errors import ModelError, SettingError, first_line
from pact_offline.models.load import default_device, empty_model
from pact_offline.settings.stages import FinetuneSettings, LoraSettings

log = logging.getLogger(__name__)

_QUERY_AND_VALUE = {"q_proj", "v_proj"}  # of the published script
# What an attention module adds up its heads with; all else in it reads what comes in.
_OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "wo"}
_ATTENTION = re.compile(r".*(attn|attention)[^.]*")
# Of these such modules get none: kernels read their weight, and would pass an adapter by.
_MAMBAS = {
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h",
    "zamba2",
}  # fmt: skip
_READ_BY_KERNELS = r".*\.(out_proj|conv1d)"
_ROUTERS = r".*\.(router|gate|shared_expert_gate)(\..*)?"
_ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, Conv1D)  # by peft
_END = re.compile(r"[^.]+(?:\.\d+)*$")
_MOST_LAYERS = 10_000  # of a model that does not say how many it has
_EXPERT_DIMENSIONS = 3  # the weights of all experts, in one parameter


@dataclass(frozen=True)
class LoraTargets:
    """What peft is told.

    Attributes:
        modules: ends of module names.
        parameters: ends of the names of parameters that no linear module holds, as experts'.
        excluded: a pattern of whole module names, or None.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    excluded: str | None


def lora_targets(policy: Any, model: str, settings: LoraSettings) -> LoraTargets:
    """Find the modules that the settings name, in the language model alone.

    `auto` are the query and value projections, or what else a layer's attention reads with, fused
    or low-rank, where it has no such two. `all-linear` are all linear modules and the experts, but
    neither the LM head nor routers, nor what peft adapts in no model of its type (`out_proj` of
    Mamba's). Of a model that also sees or hears, towers have none.

    Args:
        policy: the model, its weights need not be there.
        model: its name, for messages.
        settings: of the run.

    Raises:
        SettingError: names the candidates, or what else stands in the way.
    """
    if _is_orthogonal(settings) and settings.lora_rank % 2:
        raise SettingError(
            "--lora-rank: expected an even number for --lora-init orthogonal, found "
            f"{settings.lora_rank}"
        )
    is_all = settings.lora_modules == ("all-linear",)
    excluded = _excluded(policy, settings, routers=is_all)
    linear = _linear_modules(policy, excluded)
    experts = _experts(policy, excluded)
    if is_all and linear:
        names = _ends(_all_linear(policy, settings))
        _require_what_experts_take(settings, model, "all-linear", experts)
        return LoraTargets(names, experts, excluded)
    names = (
        _attention_inputs(linear) if settings.lora_modules == ("auto",) else settings.lora_modules
    )
    places = [name for name in _adaptable(policy) if not _is(name, excluded)]
    modules = tuple(want for want in names if any(_ends_in(name, want) for name in places))
    places = [name for name, _ in policy.named_parameters() if _ends_in_one(name, experts)]
    parameters = tuple(want for want in names if any(_ends_in(name, want) for name in places))
    missing = [want for want in names if want not in {*modules, *parameters}]
    if missing or not names:
        first = settings.lora_first_layer
        raise SettingError(
            f"--lora-modules: expected modules of {model}"
            f"{f' from layer {first} on' if first else ''} "
            f"({', '.join((*_ends(linear), *experts))}), or all-linear alone; "
            f"found {missing[0] if missing else settings.lora_modules[0]!r}"
        )
    _require_what_experts_take(settings, model, ", ".join(parameters), parameters)
    if (tied := _tied(policy, names)) is not None:
        raise SettingError(
            f"--lora-modules: expected none of the embeddings and the LM head of {model}, which "
            f"are one weight, found {tied!r}"
        )
    return LoraTargets(modules, parameters, excluded)


def _tied(policy: Any, names: Iterable[str]) -> str | None:
    """Which of the names is of embeddings that are the LM head too: merged, both would change."""
    if not getattr(policy.config.get_text_config(), "tie_word_embeddings", False):
        return None
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())
    places = [name for name, module in policy.named_modules() if any(module is e for e in ends)]
    return next((want for want in names if any(_ends_in(at, want) for at in places)), None)


def adapted_modules(policy: Any, targets: LoraTargets) -> dict[str, list[str]]:
    """Names of the modules and parameters that get an adapter, by their ends."""
    names = [
        *(name for name, _ in policy.named_modules() if not _is(name, targets.excluded)),
        *(name for name, _ in policy.named_parameters() if not _is(name, targets.excluded)),
    ]
    wanted = (*targets.modules, *targets.parameters)
    found = {want: [name for name in names if _ends_in(name, want)] for want in wanted}
    return {want: places for want, places in found.items() if places}


def check_lora_modules(model: str, settings: FinetuneSettings) -> None:
    """`with_adapter` before weights are loaded; says what `all-linear` has to leave out.

    A model that cannot be made without its weights is left to `with_adapter`.

    Raises:
        SettingError: names the candidates, or what else stands in the way.
    """
    if settings.method == "full":
        return
    try:
        policy = empty_model(model)
    except ModelError:  # loading it will say what is wrong
        return
    _require_dora_runs(policy, model, settings)
    is_all = settings.lora_modules == ("all-linear",)
    wanted = _all_linear(policy, settings) if is_all else ()
    with torch.device("meta"):
        adapted = with_adapter(policy, model, settings)
    got = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters()}
    got = {name.removeprefix("base_model.model.") for name in got}
    if left_out := sorted(name for name in wanted if name not in got):
        log.warning(
            "--lora-modules all-linear: peft gives experts their adapters in place of %s linear "
            "modules with names like theirs, as %s, which get none",
            f"{len(left_out):,}",
            left_out[0],
        )
    if is_all and policy.config.model_type in _MAMBAS:
        log.warning(
            "--lora-modules all-linear: no out_proj gets an adapter in a model of type %s, whose "
            "kernels would pass it by; all other linear modules get one",
            policy.config.model_type,
        )


def _require_dora_runs(policy: Any, model: str, settings: FinetuneSettings) -> None:
    """Refuse DoRA over weights in 8 bits on a CPU, where peft loses their scales at the first step.

    Raises:
        SettingError: they are.
    """
    quantised = getattr(policy.config, "quantization_config", None) or {}
    is_eight = settings.load_in == "8bit" or quantised.get("load_in_8bit")
    if settings.lora_dora and is_eight and default_device().type == "cpu":
        raise SettingError(
            f"--lora-dora: expected weights of {model} that are not in 8 bits on a CPU, where peft "
            "loses their scales"
        )


def with_adapter(policy: Any, model: str, settings: LoraSettings) -> Any:
    """A new LoRA adapter (in fp32) over a model's weights.

    Raises:
        SettingError: peft refuses the modules.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(policy, model, settings)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.lora_rslora,
        use_dora=settings.lora_dora,
        init_lora_weights=True if settings.lora_init == "default" else settings.lora_init,
        target_modules=list(targets.modules),
        target_parameters=_experts_in_full(policy, targets) or None,
        exclude_modules=targets.excluded,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(policy, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingError(
            f"--lora-modules: expected modules of {model} that peft adapts, found "
            f"{first_line(error)}"
        ) from None


def _is_orthogonal(settings: LoraSettings) -> bool:
    return settings.lora_init == "orthogonal"


def _is(name: str, pattern: str | None) -> bool:
    return pattern is not None and re.fullmatch(pattern, name) is not None


def _ends_in(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _ends_in_one(name: str, ends: Iterable[str]) -> bool:
    return any(_ends_in(name, end) for end in ends)


def _ends(names: Iterable[str]) -> tuple[str, ...]:
    """Ends that tell modules by name; of one in a list, with the list's."""
    return tuple(sorted({_END.findall(name)[0] for name in names}))


def _linear_modules(policy: Any, excluded: str | None) -> dict[str, Any]:
    return {
        name: module
        for name, module in policy.named_modules()
        if _is_a(module, torch.nn.Linear, Conv1D) and not _is(name, excluded)
    }


def _all_linear(policy: Any, settings: LoraSettings) -> list[str]:
    """Names of all linear modules but the LM head and routers."""
    linear = _linear_modules(policy, _excluded(policy, settings, routers=True))
    head = policy.get_output_embeddings()
    return [name for name, module in linear.items() if module is not head]


def _attention_inputs(linear: Iterable[str]) -> tuple[str, ...]:
    """Of every layer, the query and value projections, or what its attention has in their place."""
    inside: dict[str, set[str]] = {}
    for name in linear:
        place, _, end = name.rpartition(".")
        inside.setdefault(place, set()).add(end)
    names = set()
    for place, ends in inside.items():
        if ends >= _QUERY_AND_VALUE:
            names |= _QUERY_AND_VALUE
        elif _ATTENTION.fullmatch(place):
            names |= ends - _OUTPUTS
    return tuple(sorted(names))


def _adaptable(policy: Any) -> list[str]:
    """Names of the modules that peft adapts; of weights in few bits, whose kinds are many, all."""
    is_quantized = getattr(policy, "is_quantized", False)
    modules = policy.named_modules()
    return [name for name, module in modules if is_quantized or _is_a(module, *_ADAPTABLE)]


def _is_a(module: Any, *kinds: type) -> bool:
    """Whether a module is of a kind, and gives what those do: a linear router gives two values."""
    return isinstance(module, kinds) and not type(module).__name__.endswith("Router")


def _experts(policy: Any, excluded: str | None) -> tuple[str, ...]:
    """Ends of the names of the parameters that hold the weights of all experts of a layer."""
    found = {
        ".".join(name.split(".")[-2:])
        for name, parameter in policy.named_parameters()
        if parameter.dim() == _EXPERT_DIMENSIONS and "experts" in name and not _is(name, excluded)
    }
    return tuple(sorted(found))


def _experts_in_full(policy: Any, targets: LoraTargets) -> list[str]:
    """What peft is told of experts: it excludes no parameter, so those of later layers by name."""
    names = [
        name for name, _ in policy.named_parameters() if _ends_in_one(name, targets.parameters)
    ]
    kept = [name for name in names if not _is(name, targets.excluded)]
    return kept if len(kept) < len(names) else list(targets.parameters)


def _require_what_experts_take(
    settings: LoraSettings, model: str, named: str, experts: tuple[str, ...]
) -> None:
    """Refuse what peft cannot do with a parameter that no linear module holds."""
    refused: tuple[tuple[str, str, float | str | bool], ...] = (
        ("--lora-dropout", "0", settings.lora_dropout),
        ("--lora-dora", "none", settings.lora_dora),
        ("--lora-init", "default or gaussian", _is_orthogonal(settings) and settings.lora_init),
    )
    for option, expected, value in refused:
        if experts and value:
            found = "" if value is True else f", found {value}"
            raise SettingError(
                f"{option}: expected {expected} for {named} with {model}, whose experts are "
                f"parameters that peft adapts without it{found}"
            )


def _excluded(policy: Any, settings: LoraSettings, *, routers: bool) -> str | None:
    """A pattern of what gets no adapter, whatever its name; peft warns of parts that fit none."""
    layers = getattr(policy.config.get_text_config(), "num_hidden_layers", _MOST_LAYERS)
    patterns = [
        _layers_before(min(settings.lora_first_layer, layers)),
        _outside_of_language_model(policy),
        _ROUTERS if routers else None,
        _READ_BY_KERNELS if policy.config.model_type in _MAMBAS else None,
    ]
    names = [name for name, _ in policy.named_modules()]
    fitting = [one for one in patterns if one and any(_is(name, one) for name in names)]
    return "|".join(fitting) or None


def _layers_before(first: int) -> str | None:
    """A pattern of the modules of the layers 0 to first - 1, as peft reads it."""
    if not first:
        return None
    return rf".*\.(layers|h|blocks)\.({'|'.join(map(str, range(first)))})\..*"


def _outside_of_language_model(policy: Any) -> str | None:
    """A pattern of what sees and hears in a model that is more than a language model."""
    decoder = policy.get_decoder() if hasattr(policy, "get_decoder") else policy
    inside = next((name for name, module in policy.named_modules() if module is decoder), "")
    if "." not in inside:  # the model itself, or all of it but its head
        return None
    head = policy.get_output_embeddings()
    heads = [re.escape(name) for name, module in policy.named_modules() if module is head]
    return rf"(?!{'|'.join([re.escape(inside) + '(?:[.]|$)', *(f'{name}$' for name in heads)])}).*"

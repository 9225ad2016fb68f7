"""vLLM's plugin entry point: registers, by name only, a log-confidence model for every
architecture of text generation that vLLM knows. vLLM calls it in each of its processes.
"""

PREFIX = "PactLogConfidence"


def register() -> None:
    """Make `PactLogConfidence<Architecture>` known to vLLM; it is imported on use."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        is_model = architecture.endswith("ForCausalLM") and not architecture.startswith(PREFIX)
        if is_model and f"{PREFIX}{architecture}" not in known:
            ModelRegistry.register_model(
                f"{PREFIX}{architecture}", f"pact_offline.scoring.vllm_model:{architecture}"
            )

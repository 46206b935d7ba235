"""What SGLang's latent attention takes for granted on a CPU: a processor with AMX. Here it is done without (0.5.23)."""

from typing import Any

from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

from pipeline.engine.server import CPU_ATTENTION_BACKEND

_rope_cpu = factory.get_rope_cpu


def install() -> None:
    """Put both replacements in place, for every model with latent attention."""
    factory.get_rope_cpu = rope
    AttentionBackendRegistry.register(CPU_ATTENTION_BACKEND, absorbed)


def rope(*args: Any, **kwargs: Any) -> Any:
    """factory.get_rope_cpu knows DeepSeek's YaRN only: any other kind is made as on other devices."""
    scaling = kwargs.get("rope_scaling", args[5] if len(args) > 5 else None)
    if scaling is not None and scaling["rope_type"] == "deepseek_yarn":
        return _rope_cpu(*args, **kwargs)
    kwargs.pop("device", None)
    return factory.get_rope(*args[:8], **kwargs)  # the ninth is the device


def absorbed(attention: Any, forward_batch: Any) -> AttnForwardMethod:
    """How the batched backend attends: with the latents themselves, in prompts too."""
    return AttnForwardMethod.MLA

"""GLM-4.7-Flash, as SGLang has it, but for its latent attention."""

from sglang.srt.models.glm4_moe_lite import EntryClass

from pipeline.engine.inside.cpu import absorbed

__all__ = ["EntryClass"]

absorbed.install()

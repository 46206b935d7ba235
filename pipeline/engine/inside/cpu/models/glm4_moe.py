"""GLM-4.5, as SGLang has it."""

from sglang.srt.models.glm4_moe import EntryClass

__all__ = ["EntryClass"]

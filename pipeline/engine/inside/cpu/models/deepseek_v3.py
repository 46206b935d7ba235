"""DeepSeek-V3, as SGLang has it, but for its latent attention."""

from sglang.srt.models.deepseek_v2 import EntryClass

from pipeline.engine.inside.cpu import absorbed

__all__ = ["EntryClass"]

absorbed.install()

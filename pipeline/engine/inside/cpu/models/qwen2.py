"""Qwen2, as SGLang has it."""

from sglang.srt.models.qwen2 import EntryClass

__all__ = ["EntryClass"]

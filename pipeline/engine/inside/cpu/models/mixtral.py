"""Mixtral, as SGLang has it."""

from sglang.srt.models.mixtral import EntryClass

__all__ = ["EntryClass"]

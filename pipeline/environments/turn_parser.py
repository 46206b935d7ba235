"""What the policy wrote as thinking, content and tool calls, by SGLang's own parsers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import NOT_STARTED, SamerouteError

_TOOLS = ("environment.tool_parser", "sglang.srt.function_call.parser_names", "TOOL_CALL_PARSER_NAMES")
_THINKING = ("environment.reasoning_parser", "sglang.srt.parser.reasoning_parser_names", "REASONING_PARSER_NAMES")


class ParserError(SamerouteError):
    """SGLang has no such parser; the message says which it has."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class Said:
    """thinking: None where no parser looked for any, or found none. calls: (function, arguments in JSON) of each."""

    content: str
    thinking: str | None = None
    calls: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TurnParser:
    """tools, thinking: names of SGLang's parsers; None: that is not looked for."""

    tools: str | None = None
    thinking: str | None = None

    def load(self) -> None:
        """Import what it needs, which takes seconds. Raises ParserError."""
        for name, (field, module, listed) in ((self.tools, _TOOLS), (self.thinking, _THINKING)):
            if name is not None:
                known = getattr(importlib.import_module(module), listed)
                if name not in known:
                    raise ParserError(f"{field}={name}: SGLang has no such parser; take one of {', '.join(known)}")
        if self.tools is not None:
            _tool_parsers()
        if self.thinking is not None:
            _thinking_parsers()

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> Said:
        """A turn's text, whole. tools: that it may call, as a request has them; none: no calls are looked for."""
        thought = None
        if self.thinking is not None:
            thought, text = _thinking_parsers()(self.thinking, stream_reasoning=False).parse_non_stream(text)
        calls: tuple[tuple[str, str], ...] = ()
        if self.tools is not None and tools:
            offered = [_tool_class().model_validate(tool) for tool in tools]
            text, found = _tool_parsers()(offered, self.tools).parse_non_stream(text)
            calls = tuple((call.name or "", call.parameters) for call in found)
        return Said(text or "", thought or None, calls)

    def call_id(self, turn: int, index: int, before: int, function: str) -> str:
        """Of a call: nine letters and digits, which every template takes; Kimi's models write their ids themselves.

        turn: of the conversation. index: of the call in it. before: calls of earlier turns.
        """
        if self.tools == "kimi_k2":
            return f"functions.{function}:{before + index}"
        if self.tools == "kimi_k3":
            return f"{function}:{before + index}"
        return f"c{turn:05d}{index:03d}"


@functools.cache
def _tool_parsers() -> Any:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return FunctionCallParser


@functools.cache
def _thinking_parsers() -> Any:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    return ReasoningParser


@functools.cache
def _tool_class() -> Any:
    from sglang.srt.entrypoints.openai.protocol import Tool

    return Tool

"""What the policy wrote as thinking, content and tool calls, by SGLang's own parsers: whole, or as it comes."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import NOT_STARTED, SamerouteError

logger = logging.getLogger(__name__)
_SHOWN = 200  # characters of a turn in a message

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
        """A turn's text, whole. tools: that it may call, as a request has them; none: no calls are looked for. Some of
        SGLang's parsers raise where the policy writes what looks like a call and is none; it has then called nothing,
        as with those that do not, and a warning says so."""
        thought = None
        if self.thinking is not None:
            thought, text = _thinking_parsers()(self.thinking, stream_reasoning=False).parse_non_stream(text)
        calls: tuple[tuple[str, str], ...] = ()
        if self.tools is not None and tools:
            offered = [_tool_class().model_validate(tool) for tool in tools]
            try:
                text, found = _tool_parsers()(offered, self.tools).parse_non_stream(text)
            except Exception as error:  # of what the policy may write
                _say_unread(self.tools, text, error)
                found = []
            calls = tuple((call.name or "", call.parameters) for call in found)
        return Said(text or "", thought or None, calls)

    def stream(self, tools: Sequence[dict[str, Any]]) -> StreamParser:
        """For one turn whose text comes in pieces. tools: as `parse` takes them."""
        return StreamParser(self, tools)

    def call_id(self, turn: int, index: int, before: int, function: str) -> str:
        """Of a call: nine letters and digits, which every template takes; Kimi's models write their ids themselves.

        turn: of the conversation. index: of the call in it. before: calls of earlier turns.
        """
        if self.tools == "kimi_k2":
            return f"functions.{function}:{before + index}"
        if self.tools == "kimi_k3":
            return f"{function}:{before + index}"
        return f"c{turn:05d}{index:03d}"


@dataclass(frozen=True)
class Fragment:
    """What a piece of a turn adds. calls: (place of the call in the turn, its function, more of its arguments); the
    function is None but at the call's beginning."""

    thinking: str = ""
    content: str = ""
    calls: tuple[tuple[int, str | None, str], ...] = ()


class StreamParser:
    """Of one turn. What it has told stands: where a parser makes another thing of the whole text, `said` has what was
    told, and what can be added to it.

    said: the turn so far.
    """

    def __init__(self, whole: TurnParser, tools: Sequence[dict[str, Any]]):
        self._whole, self._tools = whole, tools
        self._thoughts = None if whole.thinking is None else _thinking_parsers()(whole.thinking)
        self._found = None
        if whole.tools is not None and tools:
            offered = [_tool_class().model_validate(tool) for tool in tools]
            self._found = _tool_parsers()(offered, whole.tools)
        self._text, self._lost = "", False
        self._places: dict[int, int] = {}  # of calls in the turn, by the parser's numbers
        self._told: tuple[list[str], list[str], list[list[str]]] = ([], [], [])

    @property
    def said(self) -> Said:
        thinking, content, calls = self._told
        return Said("".join(content), "".join(thinking) or None, tuple((name, text) for name, text in calls))

    def take(self, text: str) -> Fragment:
        """More of the turn's text."""
        self._text += text
        thinking, calls = "", []
        if self._thoughts is not None:
            thinking, text = self._thoughts.parse_stream_chunk(text)
        if self._found is not None:
            try:
                text, found = self._found.parse_stream_chunk(text or "")
            except Exception:  # of what the policy may write; the rest comes at the end, see TurnParser.parse
                self._found, self._lost = None, True
            else:
                calls = [self._call(item.tool_index, item.name, item.parameters or "") for item in found]
        if self._lost:
            text = ""
        return self._tell(thinking or "", text or "", [call for call in calls if call is not None])

    def _call(self, number: int, function: str | None, arguments: str) -> tuple[int, str | None, str] | None:
        if function:
            self._places[number] = len(self._places)
        place = self._places.get(number)
        if place is None or place != len(self._places) - 1:
            return None  # what belongs to no call, or to one that another has followed
        return place, function or None, arguments

    def end(self) -> Fragment:
        """What the whole text has besides: what looked like the beginning of a call, the last arguments of one."""
        whole, told = self._whole.parse(self._text, self._tools), self.said
        calls: list[tuple[int, str | None, str]] = []
        for place, (function, arguments) in enumerate(whole.calls):
            if place >= len(told.calls):
                calls.append((place, function, arguments))
                continue
            name, known = told.calls[place]
            followed = place < len(told.calls) - 1
            if name != function or not arguments.startswith(known) or (followed and arguments != known):
                break  # the stream's call is another one, and so are those behind it
            if arguments != known:
                calls.append((place, None, arguments[len(known) :]))
        return self._tell(_more(whole.thinking or "", told.thinking or ""), _more(whole.content, told.content), calls)

    def _tell(self, thinking: str, content: str, calls: list[tuple[int, str | None, str]]) -> Fragment:
        thoughts, contents, known = self._told
        thoughts.append(thinking)
        contents.append(content)
        for place, function, arguments in calls:
            if function is not None:
                known.append([function, ""])
            known[place][1] += arguments
        return Fragment(thinking, content, tuple(calls))


def _say_unread(parser: str, text: str, error: Exception) -> None:
    """SGLang's other parsers log it as well."""
    logger.warning("the parser %s found no calls in %r: %s: %s", parser, text[:_SHOWN], type(error).__name__, error)


def _more(whole: str, told: str) -> str:
    return whole[len(told) :] if whole.startswith(told) else ""


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

"""Tools of MCP servers: their list in OpenAI's form, and calls with limits on time and size.

    async with open_tools([ToolServer(command=("mcp-server-time",))], ...) as tools:
        tools.offered                                     # for the chat template
        await tools.call("get_current_time", '{"timezone": "Asia/Tokyo"}')    # a text, whatever the tool did

What a tool does wrong, and what a policy asks wrong, is a text that begins with "error: ". A server that dies is none
of the policy's doing, and raises. The protocol is the `mcp` package's (pip install 'sameroute[mcp]').
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.environments.connectors.peer import ConnectorError, words_of

_CONNECT_S = 30.0


@dataclass(frozen=True)
class ToolServer:
    """command: that speaks on its standard streams, or url: of one over streamable HTTP.

    variables: that a command gets besides PATH, HOME and the like. key_variable: of the environment, whose value is the
    bearer key of the url. tools: that are offered, by name; None: all.
    """

    command: Sequence[str] | None = None
    url: str | None = None
    variables: Sequence[str] = ()
    key_variable: str | None = None
    tools: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if (self.command is None) == (self.url is None):
            raise ConnectorError("a server of tools has either command=[program, argument] or url=http://HOST:PORT/mcp")
        if self.command is not None and shutil.which(words_of(self.command)[0]) is None:
            raise ConnectorError(f"there is no program {self.command[0]}; correct the command of the server of tools")
        if self.key_variable is not None and self.key_variable not in os.environ:
            raise ConnectorError(f"the variable {self.key_variable} is not set; it holds the key of {self.url}")

    @property
    def name(self) -> str:
        """For messages."""
        return self.url or " ".join(self.command or ())


class Tools:
    """What opened servers offer.

    offered: in OpenAI's form. max_result_chars: of a result; of a longer one the rest is cut, and it says so.
    """

    def __init__(self, call_timeout_s: float, max_result_chars: int):
        self._timeout_s, self._most = call_timeout_s, max_result_chars
        self.offered: list[dict[str, Any]] = []
        self._at: dict[str, tuple[ToolServer, Any]] = {}

    async def add(self, server: ToolServer, client: Any) -> None:
        """The tools of one more. Raises ConnectorError where two have a name, or one that is asked for is missing."""
        found, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            if (cursor := page.next_cursor) is None:
                break
        if missing := sorted(set(server.tools or ()) - {tool.name for tool in found}):
            raise ConnectorError(f"{server.name} has no tool {missing[0]}; it has {', '.join(t.name for t in found)}")
        for tool in found:
            if server.tools is not None and tool.name not in server.tools:
                continue
            if tool.name in self._at:
                raise ConnectorError(f"two servers have a tool {tool.name}; choose with `tools` of one of them")
            self._at[tool.name] = (server, client)
            described = {} if tool.description is None else {"description": tool.description}
            function = {"name": tool.name} | described | {"parameters": tool.input_schema}
            self.offered.append({"type": "function", "function": function})

    async def call(self, name: str, arguments: str) -> str:
        """What the tool says, or "error: " and why it says nothing. arguments: JSON. Raises ConnectorError where the
        server is gone."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        if name not in self._at:
            return f"error: there is no tool {name}; there are {', '.join(self._at)}"
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:  # the policy may write a thousand brackets
            return f"error: the arguments are no JSON: {error}"
        if not isinstance(given, dict):
            return "error: the arguments are no JSON object"
        server, client = self._at[name]
        try:
            result = await asyncio.wait_for(client.call_tool(name, given), self._timeout_s)
        except TimeoutError:
            return f"error: {name} took more than {self._timeout_s:g} s"
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise ConnectorError(f"the server of tools {server.name} is gone: {error}") from error
            return self._cut(f"error: {error}")
        except (RuntimeError, ValueError) as error:  # a result that is not what the tool promised
            return self._cut(f"error: {name} gave no result that can be read: {error}")
        return self._cut(("error: " if result.is_error else "") + _text(result.content))

    def _cut(self, text: str) -> str:
        over = len(text) - self._most
        return text if over <= 0 else f"{text[: self._most]}... ({over} characters more)"


def _text(content: Sequence[Any]) -> str:
    """Of the parts of a result; a part that is no text is named."""
    return "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in content)


@contextlib.asynccontextmanager
async def open_tools(
    servers: Sequence[ToolServer], *, call_timeout_s: float, max_result_chars: int, start_timeout_s: float
) -> AsyncIterator[Tools]:
    """Start or reach the servers, which are left with the context. Raises ConnectorError.

    They are held by a task of their own, and errors cross its border as values: inside the transports' own contexts an
    error becomes a part of a group of errors.
    """
    _library()
    tools, left = Tools(call_timeout_s, max_result_chars), asyncio.Event()
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    holder = asyncio.create_task(_hold(servers, tools, start_timeout_s, ready, left))
    try:
        await ready
        yield tools
    finally:
        left.set()
        if not ready.done() or ready.cancelled():
            holder.cancel()
        await asyncio.wait({holder})


async def _hold(
    servers: Sequence[ToolServer],
    tools: Tools,
    start_timeout_s: float,
    ready: asyncio.Future[None],
    left: asyncio.Event,
) -> None:
    """Open all, say so, and close them when they are left. How well they close nobody has to know."""
    with contextlib.suppress(Exception):
        async with contextlib.AsyncExitStack() as opened:
            for server in servers:
                words = opened.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
                try:
                    async with asyncio.timeout(start_timeout_s):
                        client = await opened.enter_async_context(_library().Client(_transport(server, words)))
                        await tools.add(server, client)
                except Exception as error:  # a group of them, from the tasks of the transport
                    if not ready.done():
                        ready.set_exception(_unusable(server, error, words, start_timeout_s))
                    return
            ready.set_result(None)
            await left.wait()


def _unusable(server: ToolServer, error: Exception, words: Any, start_timeout_s: float) -> ConnectorError:
    if isinstance(error, ConnectorError):
        return error
    words.seek(0)
    said = words.read().strip()
    why = f"it did not answer within {start_timeout_s:g} s" if isinstance(error, TimeoutError) else _reason(error)
    return ConnectorError(f"{server.name} offers no tools: {why}" + (f"; it said: {said[-400:]}" if said else ""))


def _transport(server: ToolServer, words: Any) -> Any:
    """words: a file for the standard error of a command."""
    library = _library()
    if server.command is not None:
        program, *arguments = words_of(server.command)
        given = {name: os.environ[name] for name in server.variables if name in os.environ}
        return library.stdio_client(
            library.StdioServerParameters(command=program, args=arguments, env=given), errlog=words
        )
    return _over_http(server)


@contextlib.asynccontextmanager
async def _over_http(server: ToolServer) -> AsyncIterator[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    headers = {}
    if server.key_variable is not None:
        headers["Authorization"] = f"Bearer {os.environ[server.key_variable]}"
    times = httpx2.Timeout(_CONNECT_S, read=None)  # a stream may be silent; calls have limits of their own
    async with (
        httpx2.AsyncClient(headers=headers, timeout=times) as client,
        streamable_http_client(server.url or "", http_client=client) as streams,
    ):
        yield streams


def _reason(error: BaseException) -> str:
    """The first that went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def _library() -> Any:
    """Raises ConnectorError where it is not installed."""
    try:
        import mcp
    except ImportError as error:
        raise ConnectorError("tools of MCP servers need their package: pip install 'sameroute[mcp]'") from error
    return mcp

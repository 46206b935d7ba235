"""Tools of MCP servers: a public one of the package index, one over HTTP with a key, and one that is hostile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer

from pipeline.environments.connectors.mcp import ToolServer, open_tools
from pipeline.environments.connectors.peer import ConnectorError

CLOCK = ToolServer((str(Path(sys.executable).parent / "mcp-server-time"), "--local-timezone", "UTC"))
HOSTILE = ToolServer((sys.executable, str(Path(__file__).parent / "hostile_tools.py")))


def with_tools(work, *servers, **limits):
    """What the work makes of the opened tools."""

    async def run():
        settings = {"call_timeout_s": 20.0, "max_result_chars": 500, "start_timeout_s": 30.0} | limits
        async with open_tools(servers, **settings) as tools:
            return await work(tools)

    return asyncio.run(run())


def called(*calls, server=HOSTILE, **limits):
    """What each call says, one after another."""

    async def work(tools):
        return [await tools.call(name, arguments) for name, arguments in calls]

    return with_tools(work, server, **limits)


def test_a_public_server_offers_its_tools_in_openai_form_and_they_can_be_called():
    async def work(tools):
        given = {"source_timezone": "Asia/Tokyo", "time": "12:00", "target_timezone": "Asia/Kolkata"}
        right = await tools.call("convert_time", json.dumps(given))
        return tools.offered, right, await tools.call("get_current_time", '{"timezone": "Atlantis"}')

    offered, right, wrong = with_tools(work, CLOCK)
    assert {tool["function"]["name"] for tool in offered} == {"get_current_time", "convert_time"}
    assert all(tool["type"] == "function" and tool["function"]["description"] for tool in offered)
    assert "timezone" in offered[0]["function"]["parameters"]["properties"]
    assert json.loads(right)["target"]["datetime"].partition("T")[2].startswith("08:30")
    assert wrong.startswith("error: ")
    assert "Atlantis" in wrong


def test_what_a_tool_or_a_policy_does_wrong_is_a_text():
    said = called(
        ("echo", '{"a": 1}'), ("fail", ""), ("nothing", "{}"), ("echo", "{a"), ("echo", "[1]"), ("flood", "{}"),
        ("empty", "{}"), ("junk", "{}"), ("echo", "{}"),
    )  # fmt: skip
    assert said[0] == '{"a": 1}'
    assert said[1] == "error: no luck"
    assert said[2].startswith("error: there is no tool nothing; there are echo,")
    assert said[3].startswith("error: the arguments are no JSON: ")
    assert said[4] == "error: the arguments are no JSON object"
    assert said[5] == "x" * 500 + "... (999500 characters more)"
    assert said[6] == ""
    assert said[7:] == ["junk", "{}"]


def test_a_tool_that_hangs_is_a_text_after_its_time_and_one_that_dies_ends_the_conversation():
    began = time.monotonic()
    assert called(("hang", "{}"), call_timeout_s=0.3) == ["error: hang took more than 0.3 s"]
    assert time.monotonic() - began < 8
    with pytest.raises(ConnectorError, match=r"hostile_tools\.py is gone"):
        called(("die", "{}"))


def test_a_server_that_cannot_be_used_is_refused_and_says_why(monkeypatch):
    with pytest.raises(ConnectorError, match="no program nothing-of-this-name"):
        ToolServer(("nothing-of-this-name",))
    with pytest.raises(ConnectorError, match="a command is a list of texts"):
        ToolServer("mcp-server-time --local-timezone UTC")
    with pytest.raises(ConnectorError, match=r"either command=.* or url="):
        ToolServer()
    with pytest.raises(ConnectorError, match="MY_KEY is not set"):
        ToolServer(url="http://127.0.0.1:9/mcp", key_variable="MY_KEY")
    for server, why in (
        (ToolServer((sys.executable, "-c", "raise SystemExit('no luck')")), "it said: no luck"),
        (ToolServer((sys.executable, "-c", "import time; time.sleep(60)")), "did not answer within 1 s"),
        (ToolServer(url="http://127.0.0.1:9/mcp"), "http://127.0.0.1:9/mcp offers no tools: "),
        (ToolServer(HOSTILE.command, tools=("dance",)), "has no tool dance; it has echo, fail"),
    ):
        with pytest.raises(ConnectorError, match=why):
            called(server=server, start_timeout_s=1.0)
    with pytest.raises(ConnectorError, match="two servers have a tool echo"):
        with_tools(None, HOSTILE, HOSTILE)


@contextlib.contextmanager
def over_http(key):
    """The url of a server in a thread, which wants the key."""
    made = MCPServer("adder")

    @made.tool()
    def add(a: int, b: int) -> int:
        """The sum."""
        return a + b

    inner = made.streamable_http_app()

    async def guarded(scope, receive, send):
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != f"Bearer {key}".encode():
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await inner(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(guarded, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/mcp"
    finally:
        server.should_exit = True
        thread.join()


def test_a_server_over_http_is_told_its_key_and_refuses_another(monkeypatch):
    with over_http("right") as url:
        monkeypatch.setenv("MY_KEY", "right")
        server = ToolServer(url=url, key_variable="MY_KEY")
        assert called(("add", '{"a": 12, "b": 30}'), server=server) == ["42"]
        monkeypatch.setenv("MY_KEY", "wrong")
        with pytest.raises(ConnectorError, match=f"{url} offers no tools: "):
            called(server=server)

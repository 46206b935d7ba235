"""A server of MCP tools that does what servers should not: dies, hangs, floods, says what is no JSON."""

from __future__ import annotations

import json
import os
import sys
import time

TOOLS = ("echo", "fail", "die", "hang", "flood", "junk", "empty")


def called(name: str, arguments: dict) -> dict:
    """A result."""
    if name == "die":
        os._exit(3)
    if name == "hang":
        time.sleep(60)
    if name == "junk":
        print("no JSON at all", flush=True)
    text = {"echo": json.dumps(arguments), "fail": "no luck", "flood": "x" * 1_000_000}.get(name, name)
    content = [] if name == "empty" else [{"type": "text", "text": text}]
    return {"content": content, "isError": name == "fail"}


def answered(asked: dict) -> dict:
    """The rest of a JSON-RPC answer."""
    if asked["method"] == "initialize":
        who = {"name": "hostile", "version": "1"}
        version = asked["params"]["protocolVersion"]
        return {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": who}}
    if asked["method"] == "tools/list":
        return {"result": {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in TOOLS]}}
    if asked["method"] == "tools/call":
        return {"result": called(asked["params"]["name"], asked["params"].get("arguments") or {})}
    return {"error": {"code": -32601, "message": f"no {asked['method']}"}}


for line in sys.stdin:
    asked = json.loads(line)
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"]} | answered(asked)), flush=True)

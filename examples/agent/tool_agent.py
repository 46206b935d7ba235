"""An agent that knows an address, a key, and nothing of training: it multiplies with a tool, in plain Python.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python examples/agent/tool_agent.py < prompt.json

A run starts it for each conversation (docs/endpoint.md). Its last line is the reward. The model must know tools.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request

TURNS = 4
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "The product of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def complete(messages: list[dict]) -> dict:
    """The model's next message."""
    body = {"model": os.environ["OPENAI_MODEL"], "messages": messages, "tools": [TOOL]}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]


def result(call: dict) -> str:
    """What the tool says."""
    try:
        arguments = json.loads(call["function"]["arguments"])
        return str(int(arguments["a"]) * int(arguments["b"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error!r}"


def main() -> None:
    prompt = json.loads(sys.stdin.readline())
    messages, calls = prompt["messages"], 0
    for _ in range(TURNS):
        message = complete(messages)
        messages.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            calls += 1
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result(call)})
    right = float((messages[-1]["content"] or "").strip() == prompt["metadata"]["answer"])
    print(json.dumps({"reward": right, "parts": {"right": right, "calls": calls}, "note": f"{calls} calls"}))


if __name__ == "__main__":
    main()

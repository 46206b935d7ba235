"""An agent that knows an address, a key, and nothing of training: it answers `(37*48)` with `1776`, in plain Python.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... OPENAI_MODEL=... python examples/agent/agent.py < prompt.json

A run starts it for each conversation (examples/agent/agent.yaml). Its last line is the reward.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request

CALL = re.compile(r"\((\d+)\*(\d+)\)")


def complete(messages: list[dict]) -> dict:
    """The model's next message."""
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]


def main() -> None:
    prompt = json.loads(sys.stdin.readline())
    messages, calls = prompt["messages"], 0
    while True:
        messages.append(complete(messages))
        call = CALL.fullmatch(messages[-1]["content"])
        if call is None:
            break
        calls += 1
        messages.append({"role": "tool", "content": str(int(call[1]) * int(call[2]))})
    right = float(messages[-1]["content"] == prompt["metadata"]["answer"])
    print(json.dumps({"reward": right, "parts": {"right": right, "calls": calls}, "note": f"{calls} calls"}))


if __name__ == "__main__":
    main()

"""An environment that offers tools of MCP servers until the policy answers without calling one.

    environment:
      function: pipeline.environments.connectors.tool_use:ToolUse
      options: {servers: [{command: [mcp-server-time]}]}
      tool_parser: qwen25        # SGLang's, of the model's calls
      replies: [tool]

The reward is 1 where the last answer is the prompt's `answer`; a class of your own may have another one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.environments.connectors.mcp import Tools, ToolServer, open_tools
from pipeline.environments.connectors.peer import ConnectorError, check_positive
from pipeline.environments.conversation import Conversation
from pipeline.environments.endpoint.said import set_parts, wants_text
from pipeline.environments.reward import Reward
from pipeline.types import Prompt


class ToolUse:
    """The environment `environment.function`. Servers are started for each conversation, which so has their state for
    itself; a url is asked for a session."""

    def __init__(
        self,
        servers: Sequence[Mapping[str, Any]],
        call_timeout_s: float = 30.0,
        max_result_chars: int = 8000,
        start_timeout_s: float = 60.0,
    ):
        """servers: see ToolServer. call_timeout_s, max_result_chars: of one call. Raises ConnectorError where a server
        is not there, or offers no tools."""
        check_positive(
            call_timeout_s=call_timeout_s, max_result_chars=max_result_chars, start_timeout_s=start_timeout_s
        )
        if not servers:
            raise ConnectorError("environment.options.servers names no server of tools")
        try:
            self._servers = [ToolServer(**server) for server in servers]
        except TypeError as error:
            raise ConnectorError(
                f"a server of tools is command or url, with variables, key_variable, tools: {error}"
            ) from error
        self._open = functools.partial(
            open_tools,
            self._servers,
            call_timeout_s=call_timeout_s,
            max_result_chars=max_result_chars,
            start_timeout_s=start_timeout_s,
        )
        _tried(json.dumps([list(servers), start_timeout_s]), self._open)

    def reward(self, conversation: Conversation, prompt: Prompt) -> Reward | float:
        """Of a conversation that has ended; a class of your own may have another one."""
        return float(conversation.messages[-1]["content"].strip() == str(prompt.metadata.get("answer", "")).strip())

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        """Raises LimitReached where a limit ended the conversation, ConnectorError where a server is gone."""
        parser = conversation.parser
        if parser.tools is None:
            raise ConnectorError("calls of tools cannot be found: set environment.tool_parser to the model's")
        calls = errors = 0
        async with self._open() as tools:
            conversation.branch(conversation.messages, tools=[*conversation.opening.tools, *tools.offered])
            as_text = wants_text(conversation.writer)
            while True:
                turn = await conversation.sample()
                said = parser.parse(turn.text, conversation.opening.tools)
                found = [
                    (parser.call_id(conversation.turns, i, calls, name), name, arguments)
                    for i, (name, arguments) in enumerate(said.calls)
                ]
                set_parts(turn.message, said, found, as_text=as_text)
                if not found:
                    break
                told = await asyncio.gather(*(tools.call(name, arguments) for _, name, arguments in found))
                calls, errors = calls + len(told), errors + sum(text.startswith("error: ") for text in told)
                conversation.append(
                    [
                        {"role": "tool", "tool_call_id": number, "name": name, "content": text}
                        for (number, name, _), text in zip(found, told, strict=True)
                    ]
                )
        given = self.reward(conversation, prompt)
        reward = given if isinstance(given, Reward) else Reward(float(given), parts={})
        parts = {"tool_calls": float(calls), "tool_errors": float(errors)} | dict(reward.parts)
        value = reward.value if reward.value is not None or reward.turns is not None else reward.total()
        return Reward(value, parts, reward.turns, reward.note or f"{calls} calls")


_good: set[str] = set()


def _tried(key: str, opened: functools.partial[Any]) -> None:
    """Open the servers once in this process, so that what is wrong is known before anything starts."""
    if key in _good:
        return

    async def work() -> Tools:
        async with opened() as tools:
            return tools

    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # of its own: the caller's may have an event loop
        thread.submit(asyncio.run, work()).result()
    _good.add(key)

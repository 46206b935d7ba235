"""Environments of OpenEnv: a server with reset and step, and a session of its own for each conversation.

    environment:
      function: pipeline.environments.connectors.openenv:OpenEnv
      options: {address: "http://127.0.0.1:8000"}
      # or {command: [.venv/openenv/bin/uvicorn, "package.app:app", --host, 127.0.0.1, --port, "{port}"]}

    reset(**row["reset"]) -> observation -> the policy speaks -> action -> step -> observation, reward -> ...

The first observation ends the prompt, and each that follows is a user's message; each step's reward is its turn's.
How an action is made of what the policy says, and a text of an observation, a class of your own may say. Spoken is
OpenEnv's own WebSocket protocol (/ws), so its package is not needed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from pipeline.engine.server import reserve_port
from pipeline.environments.connectors.peer import Child, ConnectorError, check_positive, words_of
from pipeline.environments.conversation import Conversation, LimitReached
from pipeline.environments.reward import Reward
from pipeline.environments.templates import Message
from pipeline.http import Answer, HttpError, request
from pipeline.types import Prompt

GUARD: Final = Path(__file__).parent / "inside" / "guard.py"
COLUMN: Final = "reset"
"""Of a row of prompts: arguments of the environment's reset, such as a seed."""
_ASKING_S, _CLOSING_S = 5.0, 2.0
_MODELS_FAULT = ("VALIDATION_ERROR", "INVALID_JSON")


class NoAction(Exception):
    """What the policy said is no action of this environment; the message says why."""


@dataclass(frozen=True)
class Observed:
    """What the environment answers. reward: of the step; 0 where it gives none."""

    observation: Any
    reward: float
    done: bool


class OpenEnv:
    """The environment `environment.function`."""

    def __init__(
        self,
        address: str | None = None,
        command: Sequence[str] | None = None,
        invalid_reward: float = 0.0,
        call_timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        largest_message: int = 4 << 20,
        variables: Sequence[str] = (),
    ):
        """address: of a server that runs. command: in its place, one that starts it; {port} stands for a free port.
        invalid_reward: of a turn that is no action, which ends the conversation. largest_message: bytes of one answer.
        variables: that a command gets though their names look like secrets. Raises ConnectorError where nothing
        answers."""
        if (address is None) == (command is None):
            raise ConnectorError("OpenEnv has either address=http://HOST:PORT or command=[program, argument]")
        if address is not None and not address.startswith(("http://", "https://")):
            raise ConnectorError(f"environment.options.address={address} is no address; write http://HOST:PORT")
        check_positive(call_timeout_s=call_timeout_s, start_timeout_s=start_timeout_s, largest_message=largest_message)
        self._server = _server_of(address, () if command is None else words_of(command), tuple(variables))
        self._start_s, self._call_s, self._largest = start_timeout_s, call_timeout_s, largest_message
        self._invalid_reward = invalid_reward
        self.schema = self._server.schema(start_timeout_s)

    def action(self, text: str) -> Mapping[str, Any]:
        """The action in what the policy said, `action_of` self.schema; a class of your own may have another one.
        Raises NoAction."""
        return action_of(text, self.schema)

    def observation(self, seen: Any) -> str:
        """What the policy is told of an observation, `text_of` it; a class of your own may have another one."""
        return text_of(seen)

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        """Raises ConnectorError where the environment fails, and LimitReached before the first step."""
        address = await asyncio.to_thread(self._server.address, self._start_s)
        turns: list[float] = []
        async with open_session(address, self._call_s, self._largest) as session:
            seen = await session.reset(prompt.metadata.get(COLUMN) or {})
            conversation.branch(with_observation(conversation.messages, self.observation(seen.observation)))
            while not seen.done:
                try:
                    turn = await conversation.sample()
                except LimitReached:
                    if not turns:
                        raise
                    break
                try:
                    seen = await session.step(self.action(turn.text))
                except NoAction as error:
                    return Reward(turns=[*turns, self._invalid_reward], note=f"no action: {error}")
                turns.append(seen.reward)
                if not seen.done:
                    conversation.append([{"role": "user", "content": self.observation(seen.observation)}])
        if not turns:
            raise ConnectorError("the environment was done before the policy had said anything")
        return Reward(turns=turns, note=f"{len(turns)} steps" + ("" if seen.done else ", not done"))


def action_of(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The action in what the policy said: an object of JSON, also between ``` fences; where an action has one field
    that must be given, and it is a text, all that was said is that field. Raises NoAction."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    with contextlib.suppress(ValueError, RecursionError):  # the policy may write a thousand brackets
        said = json.loads(fenced[1] if fenced else text)
        if isinstance(said, dict):
            return said
    required, fields = schema.get("required") or [], schema.get("properties") or {}
    if len(required) == 1 and fields.get(required[0], {}).get("type") == "string":
        return {required[0]: text}
    raise NoAction(f"not an object of JSON with {', '.join(required) or 'the fields of an action'}")


def text_of(observation: Any) -> str:
    """An observation as the policy reads it: a text as it is; the only field that is not empty, where that is a text;
    else all of them as JSON, without metadata."""
    if isinstance(observation, dict):
        told = {k: v for k, v in observation.items() if k != "metadata" and v not in (None, "", [], {})}
        if len(told) == 1 and isinstance(only := next(iter(told.values())), str):
            return only
        return json.dumps(told, ensure_ascii=False)
    return observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)


def with_observation(messages: Sequence[Message], text: str) -> list[Message]:
    """A prompt whose last user's message ends with the text."""
    if messages and messages[-1]["role"] == "user":
        asked = messages[-1]["content"]
        return [*messages[:-1], messages[-1] | {"content": f"{asked}\n\n{text}" if asked else text}]
    return [*messages, {"role": "user", "content": text}]


class Session:
    """One environment of the server, over one connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, within_s: float):
        self._socket, self._within_s = socket, within_s

    async def reset(self, arguments: Mapping[str, Any]) -> Observed:
        """Raises ConnectorError."""
        try:
            return await self._ask({"type": "reset", "data": dict(arguments)})
        except NoAction as error:
            raise ConnectorError(f"the environment takes no reset with {dict(arguments)}: {error}") from error

    async def step(self, action: Mapping[str, Any]) -> Observed:
        """Raises NoAction where the environment does not take the action, ConnectorError where it fails."""
        return await self._ask({"type": "step", "data": dict(action)})

    async def _ask(self, message: Mapping[str, Any]) -> Observed:
        try:
            await self._socket.send_json(message)
            answer = await self._socket.receive(self._within_s)
        except TimeoutError:
            raise ConnectorError(
                f"{message['type']} took more than {self._within_s:g} s (environment.options.call_timeout_s)"
            ) from None
        except (HttpError, ConnectionError) as error:
            raise ConnectorError(f"the environment's server went away in {message['type']}: {error}") from error
        if answer.type != aiohttp.WSMsgType.TEXT:
            reason = answer.extra or self._socket.exception() or f"it closed the connection ({self._socket.close_code})"
            raise ConnectorError(f"the environment's server went away in {message['type']}: {reason}")
        return _observed(answer.data)


def _observed(text: str) -> Observed:
    """Of a message of the server. Raises NoAction and ConnectorError."""
    try:
        told = json.loads(text)
        kind, data = told["type"], told["data"]
        if kind == "error":
            code, why = data.get("code"), f"{data.get('message')} {data.get('errors') or ''}".strip()
            if code in _MODELS_FAULT:
                raise NoAction(why[:500])
            more = "; lower environment.at_once to what the server allows" if code == "CAPACITY_REACHED" else ""
            raise ConnectorError(f"the environment failed with {code}: {why[:500]}{more}")
        if kind != "observation":
            raise ValueError(f"a message of the type {kind!r}")
        return Observed(data["observation"], float(data.get("reward") or 0.0), bool(data.get("done")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConnectorError(f"the environment said what OpenEnv does not have: {text[:200]!r} ({error})") from error


@contextlib.asynccontextmanager
async def open_session(address: str, call_timeout_s: float, largest_message: int) -> AsyncIterator[Session]:
    """A session of the server's; it ends with the context. Raises ConnectorError."""
    url = re.sub("^http", "ws", address) + "/ws"
    async with aiohttp.ClientSession() as client:
        try:
            opened = await asyncio.wait_for(
                client.ws_connect(url, max_msg_size=largest_message),
                call_timeout_s,
            )
        except (HttpError, TimeoutError, OSError) as error:
            raise ConnectorError(f"no session at {url}: {error or 'it took too long'}") from error
        try:
            yield Session(opened, call_timeout_s)
        finally:
            with contextlib.suppress(HttpError, ConnectionError, TimeoutError):
                await opened.send_json({"type": "close"})
                await asyncio.wait_for(opened.close(), _CLOSING_S)


class _Server:
    """A server that is there, or one that is started, and started again where it has died."""

    def __init__(self, address: str | None, command: tuple[str, ...], variables: tuple[str, ...]):
        self._given, self._command, self._variables = address, command, variables
        self._one, self._child, self._port = threading.Lock(), None, 0

    def address(self, within_s: float) -> str:
        """Where it answers. Raises ConnectorError."""
        if self._given is not None:
            return self._given.rstrip("/")
        with self._one:
            if self._child is None or self._child.process.poll() is not None:
                self._start(within_s)
            return f"http://127.0.0.1:{self._port}"

    def schema(self, within_s: float) -> dict[str, Any]:
        """JSON schema of its actions. Raises ConnectorError."""
        address = self.address(within_s)
        try:
            told = _get(f"{address}/schema").json()["action"]
        except (HttpError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConnectorError(f"no OpenEnv server answers at {address}/schema: {error or 'too slow'}") from error
        if not isinstance(told, dict):
            raise ConnectorError(f"{address}/schema says no schema of actions: {str(told)[:200]}")
        return told

    def _start(self, within_s: float) -> None:
        self._port = reserve_port("127.0.0.1", None)
        filled = [part.replace("{port}", str(self._port)) for part in self._command]
        if filled == list(self._command):
            raise ConnectorError(
                "environment.options.command names no {port}; write it where the server takes its port"
            )
        what = f"the server {self._command[0]}"
        self._child = child = Child(
            [sys.executable, str(GUARD), *filled], what, variables=self._variables, answers=False
        )
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if child.process.poll() is not None:
                raise ConnectorError(child.ended())
            with contextlib.suppress(HttpError, TimeoutError, OSError):
                if _get(f"http://127.0.0.1:{self._port}/health").status == 200:
                    return
            time.sleep(0.1)
        child.close()
        raise ConnectorError(
            f"{what} did not answer at /health within {within_s:g} s (environment.options.start_timeout_s): "
            f"{child.last_words}"
        )


_servers: dict[tuple[Any, ...], _Server] = {}
_one = threading.Lock()


def _server_of(address: str | None, command: tuple[str, ...], variables: tuple[str, ...]) -> _Server:
    """One for all threads of a run."""
    key = (address, command, variables)
    with _one:
        return _servers.setdefault(key, _Server(*key))


def _get(url: str) -> Answer:
    return request("GET", url, timeout_s=_ASKING_S)

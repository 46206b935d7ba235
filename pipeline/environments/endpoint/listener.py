"""The server of all conversations of a run: one address, and a key for each conversation.

    async with serve(conversation) as address:      # address.url, address.key, address.model
        ...                                         # whoever knows the key leads the conversation

It has an event loop in a thread of its own: neither an environment that blocks nor the servers' connections have to do
with it. It listens on this machine alone, from the first conversation to the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from aiohttp import web

from pipeline.environments.conversation import Conversation
from pipeline.environments.endpoint.forms import FORMS, Answer
from pipeline.environments.endpoint.refusals import Refusal, openai_form
from pipeline.environments.endpoint.served_conversation import Branch, ServedConversation, Spoken
from pipeline.environments.endpoint.turn_stream import Delta

LARGEST_BODY: Final = 16 << 20  # bytes
_WAITING: Final = 4096  # connections that the system takes before they are accepted


@dataclass(frozen=True)
class Address:
    """url: http://127.0.0.1:PORT/v1. key: of this conversation alone, dead once it has ended. model: its name."""

    url: str
    key: str = field(repr=False)
    model: str


@contextlib.asynccontextmanager
async def serve(conversation: Conversation, *, model: str = "policy") -> AsyncIterator[Address]:
    """The conversation's address, as long as the context lasts; meanwhile nobody else may lead it.

    Its parsers are those of the configuration (environment.tool_parser, environment.reasoning_parser). Raises at the
    end what went wrong in the server itself.
    """
    listener = _shared()
    address = Address(listener.url, f"sk-{secrets.token_hex(16)}", model)
    served = ServedConversation(conversation, model, listener.counts.add)
    listener.served[address.key] = served
    listener.counts.add("conversations")
    try:
        yield address
    finally:
        del listener.served[address.key]
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(served.end(), listener.loop))
    if served.error is not None:
        raise served.error


def endpoint_metrics() -> dict[str, float]:
    """Of what happened since the last call; nothing where no conversation was served."""
    counts = Counter() if _listener is None else _listener.counts.take()
    if not counts:
        return {}
    branches = (f"branches_{why}" for why in get_args(Branch))
    names = ("conversations", "requests", "refused", "disconnects", "streams_lost", *branches)
    return {f"endpoint/{name}": float(counts[name]) for name in names}


class _Counts:
    """Of things by name, from several threads."""

    def __init__(self):
        self._counts: Counter[str] = Counter()
        self._one = threading.Lock()

    def add(self, name: str) -> None:
        with self._one:
            self._counts[name] += 1

    def take(self) -> Counter[str]:
        """Since the last call."""
        with self._one:
            counts, self._counts = self._counts, Counter()
        return counts


class _Listener:
    """served: by key."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.served: dict[str, ServedConversation] = {}
        self.counts = _Counts()
        started: list[str | BaseException] = []
        ready = threading.Event()
        threading.Thread(target=self._run, args=(started, ready), name="sameroute endpoint", daemon=True).start()
        ready.wait()
        if isinstance(started[0], BaseException):
            raise started[0]
        self.url = started[0]

    def _run(self, started: list[str | BaseException], ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            started.append(self.loop.run_until_complete(self._listen()))
        except BaseException as error:  # whoever made it raises it
            started.append(error)
        ready.set()
        if isinstance(started[0], str):
            self.loop.run_forever()

    async def _listen(self) -> str:
        application = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._in_form])
        for path in FORMS:
            application.router.add_post(path, self._answer)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/v1/models/{name}", self._model)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=_WAITING).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    @web.middleware
    async def _in_form(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Whatever ends without an answer does so in the form of its path."""
        try:
            return await handler(request)
        except web.HTTPException as error:
            refusal = _of_http(request, error)
        except Exception as error:
            refusal = self._refusal(request, error)
        self.counts.add("refused")
        form = FORMS[request.path].form if request.path in FORMS else openai_form
        again = {"x-should-retry": "false"}  # what clients would otherwise do after a 5xx
        return web.json_response(form(refusal), status=refusal.status, headers=again)

    def _refusal(self, request: web.Request, error: Exception) -> Refusal:
        """What is told of an error; a mistake of this code ends the attempt."""
        if isinstance(error, Refusal):
            return error
        if (served := self.served.get(_key(request))) is not None:
            served.error = served.error or error
        return Refusal(500, f"{type(error).__name__}: {error}", code="internal_error")

    def _led(self, request: web.Request) -> ServedConversation:
        served = self.served.get(_key(request))
        if served is None:
            raise Refusal(401, "no conversation has this key, or it has ended", code="invalid_api_key")
        return served

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [_described(self._led(request).model)]})

    async def _model(self, request: web.Request) -> web.Response:
        own, name = self._led(request).model, request.match_info["name"]
        if name != own:
            raise Refusal(404, f"there is no model {name!r}; this run's is {own!r}", code="model_not_found")
        return web.json_response(_described(own))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        served = self._led(request)
        try:
            body: Any = json.loads(await request.read())
        except (ValueError, RecursionError, web.RequestPayloadError) as error:  # the last: not of its Content-Encoding
            raise Refusal(400, f"the body is no JSON: {error}", code="invalid_json") from error
        answer = FORMS[request.path](body)
        if not answer.request.stream:
            return web.json_response(answer.whole(await served.answer(answer.request)))
        async with contextlib.aclosing(served.stream(answer.request)) as parts:
            return await self._streamed(request, answer, parts)

    async def _streamed(
        self, request: web.Request, answer: Answer, parts: AsyncIterator[Delta | Spoken]
    ) -> web.StreamResponse:
        """It begins with the first token: what goes wrong before has a status of its own."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async for part in parts:
                if not response.prepared:
                    await response.prepare(request)
                if told := answer.end(part) if isinstance(part, Spoken) else answer.delta(part):
                    await response.write(told)
        except ConnectionResetError:  # the client has gone; whoever closes the parts ends the sampling
            return response
        except Exception as error:
            if not response.prepared:
                raise
            self.counts.add("refused")
            await response.write(answer.broken(self._refusal(request, error)))
        await response.write_eof()
        return response


def _key(request: web.Request) -> str:
    """As clients of OpenAI send it, or as those of Anthropic do."""
    bearer = request.headers.get("Authorization", "").split()  # the word before the key may have any case
    return request.headers.get("x-api-key") or (bearer[-1] if bearer else "")


def _described(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "sameroute"}


def _of_http(request: web.Request, error: web.HTTPException) -> Refusal:
    if error.status == 404:
        return Refusal(404, f"there is no {request.path}; there are /v1/models, {', '.join(FORMS)}", code="unknown_url")
    if error.status == 405:
        return Refusal(405, f"{request.path} does not take {request.method}", code="method_not_allowed")
    if error.status == 413:
        return Refusal(413, f"a body may have {LARGEST_BODY:,} bytes", code="request_too_large")
    return Refusal(error.status, error.reason)


_listener: _Listener | None = None
_making = threading.Lock()


def _shared() -> _Listener:
    """The process's one, made with the first conversation."""
    global _listener
    with _making:
        if _listener is None:
            _listener = _Listener()
        return _listener

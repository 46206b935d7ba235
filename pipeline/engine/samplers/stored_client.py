"""A server's client that does not decode: a sampler process does, and the routes stay in the object store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.cluster.placement import on_node
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import UnreachableError
from pipeline.engine.samplers.sampler_process import Call, Light, SamplerProcess
from pipeline.engine.sampling import OnTokens, Sampling, unheard
from pipeline.say import to_stderr
from pipeline.stored import Routes, StoredRoutes
from pipeline.types import Sampled

_CALLS = 100_000  # at once in a sampler process: the servers queue
_LISTEN_S = 1.0
_LISTEN_CLOSELY_S = 0.05  # while somebody waits for each token
_HANGS_S = 150.0  # and as long once more without an answer to that, which is longer than a start: it hangs


class Sampler:
    """A sampler process, as the controller has it; one that died is made again, and its open calls fail."""

    def __init__(self, clients: Sequence[SGLangClient], node: str | None):
        """clients: of the servers that it asks, not entered. node: of Ray, where it runs while that is there; None:
        anywhere."""
        self._clients, self._node = list(clients), node
        self._numbers = itertools.count()
        self._open: dict[int, OnTokens] = {}
        self._close: set[int] = set()
        self._listening: asyncio.Task[None] | None = None
        self._actor = self._started()

    def _started(self) -> Any:
        actor: Any = ray.remote(SamplerProcess)
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": _CALLS}
        return actor.options(**options, **on_node(self._node, or_elsewhere=True)).remote(self._clients)

    async def ask(
        self, call: Callable[[int], Call], on_tokens: OnTokens, *, closely: bool = False
    ) -> tuple[Light, Any]:
        """The answer, and a reference to its routes. call: by its number. on_tokens: called within a second of tokens
        that came, closely: within a twentieth, but not with those that came last. Given up (CancelledError), it is
        aborted.

        Raises what the client raised there, UnreachableError where the process died.
        """
        actor, number = self._actor, next(self._numbers)
        self._open[number] = on_tokens
        if closely:
            self._close.add(number)
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        try:
            light, routes = actor.answer.remote(pickle.dumps(call(number), pickle.HIGHEST_PROTOCOL))
            return await light, routes
        except asyncio.CancelledError:
            actor.give_up.remote(number)
            raise
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            if self._actor is actor:
                to_stderr(f"a sampler process died and is started again, its open answers are sampled again: {error}")
                self._actor = self._started()
            raise UnreachableError(f"the sampler process of {self._clients[0].url} died: {error}") from error
        finally:
            del self._open[number]
            self._close.discard(number)

    async def _listen(self) -> None:
        """Hear which calls get on, while there are any. A process that hangs is ended: their callers hear of that."""
        while self._open:
            await asyncio.sleep(_LISTEN_CLOSELY_S if self._close else _LISTEN_S)
            actor = self._actor
            moved = asyncio.ensure_future(actor.moved.remote())
            for _ in range(2):  # a machine that stood still for the first is no fault of the process
                if (await asyncio.wait({moved}, timeout=_HANGS_S))[0]:
                    break
            else:
                ray.kill(actor)
            with contextlib.suppress(RayActorError):  # whoever waits for an answer hears of that
                for number, pieces in (await moved).items():
                    for piece in pieces:
                        self._open.get(number, unheard)(piece)

    def stop(self) -> None:
        """End it; never raises for one that is gone."""
        ray.kill(self._actor)


class StoredClient(SGLangClient):
    """As the client that it is made of, but that sampled and scored sequences have StoredRoutes."""

    def __init__(self, client: SGLangClient, sampler: Sampler, number: int):
        """number: of the client among those of the sampler."""
        super().__init__(
            client.url,
            vocab_size=client.decoder.vocab_size,
            num_layers=client.decoder.num_layers,
            topk=client.decoder.topk,
            num_experts=client.decoder.num_experts,
            moe_layers=client.decoder.moe_layers,
            routes=client.decoder.routes,
            keys=client.keys,
            timeout_s=client.timeout_s,
            log_path=client.log_path,
        )
        self.sampler, self._number = sampler, number

    async def sample(
        self,
        token_ids: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        routes_from: int = 0,
        group: object = None,
        on_tokens: OnTokens = unheard,
    ) -> Sampled:
        content, routes = await self._ask(self._checked_ids(token_ids), on_tokens, sampling, routes_from)
        return replace(content, routes=routes)

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Routes | None]:
        return await self._ask(self._checked_ids(token_ids), unheard, None)

    async def _ask(
        self, ids: np.ndarray, on_tokens: OnTokens, sampling: Sampling | None, *how: Any
    ) -> tuple[Any, StoredRoutes | None]:
        place, url, version = self._number, self.url, self.version
        light, far = await self.sampler.ask(
            lambda number: Call(number, place, url, version, ids, sampling, *how),
            on_tokens,
            closely=sampling is not None and sampling.each_token,
        )
        self.decoder.wide_routes += light.wide
        return light.content, None if light.dtype is None else StoredRoutes((far,), light.rows, light.dtype)


@contextlib.contextmanager
def through_samplers(
    clients: Sequence[SGLangClient], count: int, nodes: Sequence[str | None]
) -> Iterator[list[SGLangClient]]:
    """The same servers, asked by `count` sampler processes, which end with the block; 0: by this process.

    nodes: of Ray, of each server; its sampler runs there. A sampler has servers of one node, so that there may be more
    than `count` of them. Ray must be up.
    """
    if not count:
        yield list(clients)
        return
    with contextlib.ExitStack() as stack:
        out: list[SGLangClient] = []
        shares = (
            [*own] for _, own in itertools.groupby(range(len(clients)), lambda i: (i * count // len(clients), nodes[i]))
        )
        for own in shares:
            sampler = Sampler([clients[i] for i in own], nodes[own[0]])
            stack.callback(sampler.stop)
            out += [StoredClient(clients[i], sampler, number) for number, i in enumerate(own)]
        yield out

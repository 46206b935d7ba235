"""Sampling over SGLang's HTTP interface (0.5.23): token ids in; token ids, log-probs, routes and versions out.

Everything that comes back is checked against what was asked for, because a silent slip here (a shifted route, a
missing log-prob) becomes a wrong gradient later.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import numpy as np

from megatron_ext.batch.routes import check_routes
from pipeline import http
from pipeline.engine.control import SGLangControl, UnreachableError, cache_key
from pipeline.engine.decoder import AnswerError, Decoder
from pipeline.engine.keys import ServerKeys
from pipeline.engine.sampling import OnTokens, Sampling, unheard
from pipeline.engine.server import ServerError
from pipeline.engine.stream import STREAM_END, RequestStream
from pipeline.stored import Routes
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Sampled

_ANSWER_S = 30.0  # in which a server that runs says what it does


class AbortedError(ServerError):
    """A request that brings nothing unless it is whole was aborted."""


class SGLangClient(SGLangControl):
    """One server, seen by the sampler.

    vocab_size: ids outside [0, vocab_size) are refused here; SGLang's scheduler dies of them.
    num_layers, topk, num_experts: shape and range of a route. moe_layers: those that have experts; None: all of them.
    routes=False: do not ask for routes.
    keys: that open the server; None: it has none.
    timeout_s: seconds for one call that steers; for one that samples, seconds in which the server gets no further.
    decoder: of its answers.
    version: of the weights that it holds, set by whoever owns it (`Fleet`); the prefix cache is kept apart by it.
    gather_s: requests of so many seconds share an HTTP request; 0: those of one moment.

    Sampling calls belong between `async with client:` and its end; `with` may be nested.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        num_layers: int,
        topk: int,
        num_experts: int,
        moe_layers: Sequence[int] | None = None,
        routes: bool = True,
        keys: ServerKeys | None = None,
        timeout_s: float = 600.0,
        log_path: Path | None = None,
    ) -> None:
        super().__init__(url, keys=keys, timeout_s=timeout_s, log_path=log_path)
        self.decoder = Decoder(
            vocab_size=vocab_size,
            num_layers=num_layers,
            topk=topk,
            num_experts=num_experts,
            moe_layers=range(num_layers) if moe_layers is None else moe_layers,
            routes=routes,
        )
        self.version = 0
        self.gather_s = 0.0
        self._session: aiohttp.ClientSession | None = None
        self._requests: RequestStream | None = None
        self._entered = 0
        self._seeds_work: bool | None = None

    async def __aenter__(self) -> Self:
        if self._entered == 0:
            self._session = http.session(None)
            self._requests = RequestStream(self._chunks, self._end_request, self.gather_s)
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0 and self._session is not None and self._requests is not None:
            await self._requests.close()
            await self._session.close()
            self._session = self._requests = None

    async def sample(
        self,
        token_ids: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        routes_from: int = 0,
        group: object = None,
        on_tokens: OnTokens = unheard,
    ) -> Sampled:
        """One request: what the server samples after a sequence, under a request id of its own.

        token_ids:   [T], all that stands there so far.
        routes_from: the first token whose row of routes comes back, 0 .. T: rows of the tokens before it are known, and
                     the server would answer with whichever forward pass computed them last.
        group:       not read here; a fleet sends what belongs together to one server.
        on_tokens:   called with tokens that have come, again and again until the answer ends.
        Returns M <= sampling.max_new_tokens tokens, and T + M - 1 - routes_from rows; of a request that was aborted
        before it ran, no token and no row.
        Raises ValueError for a bad sequence, ServerError when the server fails, AnswerError when its answer is wrong.
        """
        ids = self._checked_ids(token_ids)
        if sampling.seed is not None:
            await self._require_seeds()
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": ids.tolist(),
            "sampling_params": sampling.parameters(),
            "extra_key": cache_key(self.version),
            "return_logprob": True,
            "return_routed_experts": self.decoder.routes and sampling.with_routes,
            "routed_experts_start_len": routes_from,
            "return_sampling_mask": sampling.return_kept,
        }
        return self.decoder.sampled(await self._answer(body, on_tokens), sampling, len(ids) - 1 - routes_from)

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Routes | None]:
        """Log-probs and routes of a given sequence, by one prefill at temperature 1; nothing is sampled.

        token_ids: [T]. Returns log p(token t | tokens < t) for t = 1 .. T-1, [T-1] float32, and the routes of the
        tokens 0 .. T-2, [T-1, layers, topk] (None where the client asks for none). Errors as in `sample`, and
        AbortedError.
        """
        ids = self._checked_ids(token_ids)
        # from the first token on, and past the prefix cache
        logprobs, meta = await self._scored(ids, 0, {"return_routed_experts": self.decoder.routes})
        routes = self.decoder.decoded_routes(meta, len(ids) - 1)
        if routes is not None:
            check_routes(routes, self.decoder)
        return logprobs, routes

    async def teach(self, token_ids: Sequence[int] | np.ndarray, start: int, top_k: int) -> TeacherScores:
        """Of the tokens [T] from `start` on, at least 1, by one prefill at the server's temperature. top_k: the
        likeliest tokens at each place that come too; 0: none. Errors as in `score`."""
        ids = self._checked_ids(token_ids)
        logprobs, meta = await self._scored(ids, start - 1, {"top_logprobs_num": top_k} if top_k else {})
        try:
            if not top_k:
                return TeacherScores(logprobs)
            rows = [sorted(row, reverse=True) for row in meta["input_top_logprobs"][1:]]
            values, tops = (np.array([[pair[i] for pair in row] for row in rows], t) for i, t in ((0, "f4"), (1, "i4")))
            if tops.shape != (len(logprobs), top_k) or tops.max(initial=0) >= self.decoder.vocab_size:
                raise ValueError(f"tokens {list(tops.shape)} came for {len(logprobs)} places and top_k={top_k}")
            return TeacherScores(logprobs, tops, values)
        except ValueError as error:
            raise AnswerError(f"{self.url}/generate: {error}{self._see_log()}") from error

    async def _scored(self, ids: np.ndarray, start: int, more: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Log-probs [T - 1 - start] of the tokens after `start`, and what else the answer has."""
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
            "extra_key": cache_key(self.version),
        }
        meta = (await self._answer(body | more))["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise AbortedError(f"{self.url}/generate: a score was aborted{self._see_log()}")
        pairs, ids = meta["input_token_logprobs"], ids[start:]
        # SGLang writes 0 for the last id of its vocabulary, which it takes for a picture's padding.
        written = np.where(ids == self.decoder.vocab_size - 1, 0, ids)
        named = np.array([pair[1] for pair in pairs])
        if len(named) != len(ids) or np.any((named != ids) & (named != written)):
            raise AnswerError(f"log-probs of tokens {named.tolist()} came back for {ids.tolist()}")
        return np.array([pair[0] for pair in pairs[1:]], np.float32), meta

    def _checked_ids(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"a prompt is a non-empty row of integer token ids, not {ids.dtype} {ids.shape}")
        known = self.decoder.vocab_size
        outside = ids[(ids < 0) | (ids >= known)]
        if len(outside):
            raise ValueError(f"token ids {outside[:5].tolist()} are outside the vocabulary of {known}")
        return ids.astype(np.int32)

    async def _require_seeds(self) -> None:
        """SGLang ignores a seed without a word unless its inference is deterministic."""
        if self._seeds_work is None:
            info = await asyncio.to_thread(self.server_info)
            self._seeds_work = bool(info["enable_deterministic_inference"])
        if not self._seeds_work:
            raise ValueError("Sampling.seed needs a server with deterministic: true")

    async def _answer(self, body: dict[str, Any], on_tokens: OnTokens = unheard) -> dict[str, Any]:
        """To a /generate of one sample. It may take as long as the server gets on; `timeout_s` without is too long."""
        if self._requests is None:
            raise RuntimeError("sample inside `async with client:`")
        call = asyncio.create_task(self._requests.ask(body, on_tokens))
        try:
            seen = None
            while not (await asyncio.wait({call}, timeout=self.timeout_s))[0]:
                before, seen = seen, await self._progress()
                if seen == before:
                    raise UnreachableError(
                        f"{self.url}/generate: the server did not get on for {self.timeout_s:g} s{self._see_log()}"
                    )
            return call.result()
        finally:
            call.cancel()

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """What /generate sends."""
        assert self._session is not None
        try:
            headers = http.bearer(self._key("/generate"))
            async with self._session.post(f"{self.url}/generate", json=body, headers=headers) as response:
                if response.status != 200:
                    self._content("/generate", http.Answer(response.status, await response.text(errors="replace")))
                end = b""
                async for chunk in response.content.iter_any():
                    end = (end + chunk)[-len(STREAM_END) :]
                    yield chunk
            if end != STREAM_END:  # a server that is killed may still close its connections
                raise UnreachableError(f"{self.url}/generate was cut off{self._see_log()}")
        except http.HttpError as error:
            raise UnreachableError(f"{self.url}/generate was cut off: {error!r}{self._see_log()}") from error

    async def _end_request(self, request_id: str) -> None:
        with contextlib.suppress(ServerError):  # it is gone, and the request with it
            await self.ask("POST", "/abort_request", {"rid": request_id})

    async def _progress(self) -> object:
        """Something that is another thing once the scheduler has got on; None where the server does not answer."""
        try:
            return [(load["timestamp"], load["num_used_tokens"]) for load in await self.current_loads()]
        except ServerError:
            return None

    async def current_loads(self, timeout_s: float = _ANSWER_S) -> list[dict[str, Any]]:
        """`loads`, while other calls are in flight. Raises UnreachableError where no answer comes in time."""
        return (await self.ask("GET", "/v1/loads", timeout_s=timeout_s))["loads"]

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        """`get` and `post`, while other calls are in flight. Raises UnreachableError where no answer comes in time."""
        if self._session is None:
            raise RuntimeError("ask inside `async with client:`")
        try:
            limit, headers = aiohttp.ClientTimeout(total=timeout_s), http.bearer(self._key(path))
            async with self._session.request(
                method, self.url + path, json=body, headers=headers, timeout=limit
            ) as answer:
                return self._content(path, http.Answer(answer.status, await answer.text(errors="replace")))
        except TimeoutError as error:
            raise UnreachableError(f"{self.url}{path} did not answer in {timeout_s:g} s{self._see_log()}") from error
        except http.HttpError as error:
            raise UnreachableError(f"{self.url}{path} cannot be reached: {error}{self._see_log()}") from error

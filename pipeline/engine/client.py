"""Sampling over SGLang's HTTP interface (0.5.23): token ids in; token ids, log-probs, routes and versions out.

Everything that comes back is checked against what was asked for, because a silent slip here (a shifted route, a
missing log-prob) becomes a wrong gradient later.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import aiohttp
import numpy as np
import pybase64

from megatron_ext.batch.routes import check_routes, route_dtype
from pipeline import http
from pipeline.engine.control import SGLangControl, cache_key
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError
from pipeline.engine.stream import STREAM_END, RequestStream
from pipeline.stored import Routes
from pipeline.types import FinishReason, Sampled

_ROUTE_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32}  # by the bytes of an expert id
_ANSWER_S = 30.0  # in which a server that runs says what it does


class UnreachableError(ServerError):
    """The server was gone before it had answered, or did not get on."""


class AbortedError(ServerError):
    """A request that brings nothing unless it is whole was aborted."""


class AnswerError(ServerError):
    """The server answered, but not what was asked for."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    max_new_tokens: limit of the answer in tokens.
    temperature:    the log-probs that come back are of softmax(logits / temperature); 0 is greedy.
    top_p, top_k:   kept probability mass and kept number of tokens; -1 keeps all.
    min_p:          a token is kept that is at least this likely against the likeliest.
    return_kept:    ask for the kept tokens of every sample, and take log-probs over them. Without, log-probs are over
                    the whole vocabulary, whatever was kept. Needs a finite top_k.
    stop_token_ids: an answer ends after any of these, and after the model's own end-of-sequence ids.
    ignore_eos:     neither kind of stop token ends an answer.
    seed:           of the stream that the sample draws from; needs a server with `deterministic`.
    with_routes:    the experts of each token come back too, where the client asks for any.
    """

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    return_kept: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    with_routes: bool = True

    def __post_init__(self):
        if self.min_p > 0 and self.seed is not None:
            raise ValueError("SGLang's scheduler dies of min_p with a seed; leave one of them out")

    def parameters(self) -> dict[str, Any]:
        """SGLang's sampling_params of one sample."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
        }
        return chosen if self.seed is None else chosen | {"sampling_seed": self.seed}


class SGLangClient(SGLangControl):
    """One server, seen by the sampler.

    vocab_size: ids outside [0, vocab_size) are refused here; SGLang's scheduler dies of them.
    num_layers, topk, num_experts: shape and range of a route. moe_layers: those that have experts; None: all of them.
    routes=False: do not ask for routes.
    keys: that open the server; None: it has none.
    timeout_s: seconds for one call that steers; for one that samples, seconds in which the server gets no further.
    wide_routes: answers so far whose routes came as SGLang's own int32, and not in the narrowest type, as the servers
        of this project send them (`inside/hooks.py`).
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
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.topk = topk
        self.num_experts = num_experts
        self.moe_layers = list(range(num_layers)) if moe_layers is None else list(moe_layers)
        self.routes = routes
        self.version = 0
        self.wide_routes = 0
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
        on_tokens: Callable[[], None] = lambda: None,
    ) -> Sampled:
        """One request: what the server samples after a sequence, under a request id of its own.

        token_ids:   [T], all that stands there so far.
        routes_from: the first token whose row of routes comes back, 0 .. T: rows of the tokens before it are known, and
                     the server would answer with whichever forward pass computed them last.
        group:       not read here; a fleet sends what belongs together to one server.
        on_tokens:   called when tokens have come, again and again until the answer ends.
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
            "return_routed_experts": self.routes and sampling.with_routes,
            "routed_experts_start_len": routes_from,
            "return_sampling_mask": sampling.return_kept,
        }
        return self._sampled(await self._answer(body, on_tokens), sampling, len(ids) - 1 - routes_from)

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Routes | None]:
        """Log-probs and routes of a given sequence, by one prefill at temperature 1; nothing is sampled.

        token_ids: [T]. Returns log p(token t | tokens < t) for t = 1 .. T-1, [T-1] float32, and the routes of the
        tokens 0 .. T-2, [T-1, layers, topk] (None where the client asks for none). Errors as in `sample`, and
        AbortedError.
        """
        ids = self._checked_ids(token_ids)
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,  # from the first token on, and past the prefix cache
            "extra_key": cache_key(self.version),
            "return_routed_experts": self.routes,
        }
        meta = (await self._answer(body))["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise AbortedError(f"{self.url}/generate: a score was aborted{self._see_log()}")
        pairs = meta["input_token_logprobs"]
        # SGLang writes 0 for the last id of its vocabulary, which it takes for a picture's padding.
        written = np.where(ids == self.vocab_size - 1, 0, ids)
        named = np.array([pair[1] for pair in pairs])
        if len(named) != len(ids) or np.any((named != ids) & (named != written)):
            raise AnswerError(f"log-probs of tokens {named.tolist()} came back for {ids.tolist()}")
        logprobs = np.array([pair[0] for pair in pairs[1:]], np.float32)
        routes = self._decode_routes(meta, len(ids) - 1)
        if routes is not None:
            check_routes(routes, self)
        return logprobs, routes

    def _checked_ids(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"a prompt is a non-empty row of integer token ids, not {ids.dtype} {ids.shape}")
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(outside):
            raise ValueError(f"token ids {outside[:5].tolist()} are outside the vocabulary of {self.vocab_size}")
        return ids.astype(np.int32)

    async def _require_seeds(self) -> None:
        """SGLang ignores a seed without a word unless its inference is deterministic."""
        if self._seeds_work is None:
            info = await asyncio.to_thread(self.server_info)
            self._seeds_work = bool(info["enable_deterministic_inference"])
        if not self._seeds_work:
            raise ValueError("Sampling.seed needs a server with deterministic: true")

    async def _answer(self, body: dict[str, Any], on_tokens: Callable[[], None] = lambda: None) -> dict[str, Any]:
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

    async def current_loads(self) -> list[dict[str, Any]]:
        """`loads`, while other calls are in flight."""
        return (await self.ask("GET", "/v1/loads"))["loads"]

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

    def _sampled(self, answer: dict[str, Any], sampling: Sampling, route_rows: int) -> Sampled:
        """What one answer brings. route_rows: of its routes, but for those of the tokens that were sampled.

        Raises AnswerError for what was not asked for; `Rollout` checks what it makes of the rest.
        """
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in get_args(FinishReason):
            raise AnswerError(f"unknown finish reason {meta['finish_reason']}")
        if reason == "abort" and meta["finish_reason"].get("status_code"):
            raise AnswerError(f"the server gave the request up: {meta['finish_reason']}")
        if reason == "abort" and ("num_retractions" not in meta or not answer["output_ids"]):
            return self._nothing(sampling)  # it waited in the queue; of one that had run before, the routes are gone
        ids = np.array(answer["output_ids"], np.int32)
        count = len(ids)
        if count > sampling.max_new_tokens or (count == 0 and reason != "abort" and sampling.max_new_tokens > 0):
            raise AnswerError(f"{count} tokens for a limit of {sampling.max_new_tokens}, finish reason {reason}")
        if reason == "length" and count < sampling.max_new_tokens:
            raise AnswerError(
                f"an answer was cut at {count} of {sampling.max_new_tokens} tokens: the server has no room for more; "
                "raise server.context_length or server.max_total_tokens"
            )
        pairs = meta["output_token_logprobs"]
        if [pair[1] for pair in pairs] != answer["output_ids"]:
            raise AnswerError(f"{len(pairs)} log-probs do not belong to the {count} tokens of the answer")
        kept, logprobs = None, [pair[0] for pair in pairs]
        if sampling.return_kept:
            kept, logprobs = _decode_kept(meta, count), meta["output_token_sampling_logprobs"]
        part = Sampled(
            ids=ids,
            logprobs=np.array(logprobs, np.float32),
            routes=self._decode_routes(meta, route_rows + count) if sampling.with_routes else None,
            weight_versions=_decode_versions(meta, count),
            finish_reason=reason,
            kept=kept,
            retractions=int(meta["num_retractions"]),
        )
        self._check_model(part)
        return part

    def _nothing(self, sampling: Sampling) -> Sampled:
        """Of a request that was aborted before it ran."""
        return Sampled(
            ids=np.empty(0, np.int32),
            logprobs=np.empty(0, np.float32),
            routes=np.empty((0, self.num_layers, self.topk), route_dtype(self.num_experts))
            if self.routes and sampling.with_routes
            else None,
            weight_versions=np.empty(0, np.int32),
            finish_reason="abort",
            kept=np.empty((0, 1), np.int32) if sampling.return_kept else None,
        )

    def _check_model(self, part: Sampled) -> None:
        """Raise AnswerError for tokens or routes that cannot be the model's."""
        for array in (part.ids, part.kept):
            if array is not None and array.max(initial=-1) >= self.vocab_size:
                raise AnswerError(f"token {array.max()} is outside the model's vocabulary of {self.vocab_size}")
        if part.routes is None:
            return
        try:
            check_routes(np.asarray(part.routes), self)
        except ValueError as error:
            hint = ""
            if "twice" in str(error):
                hint = (
                    ": the server did not capture that layer's routes; set replay=none or r2, or another MoE backend "
                    "(server.extra_args)"
                )
            raise AnswerError(f"{error}{hint}") from error

    def _decode_routes(self, meta: dict[str, Any], rows: int) -> np.ndarray | None:
        """[rows, layers, topk] uint8 where that holds every expert id, else int16."""
        if not self.routes:
            return None
        if meta.get("routed_experts") is None:
            raise AnswerError("no routes came back: was the server started with return_routed_experts?")
        try:
            sent = pybase64.b64decode(meta["routed_experts"], validate=True)
        except ValueError as error:
            raise AnswerError(f"routes came back that are no base64: {error}") from error
        shape = (rows, self.num_layers, self.topk)
        width, more = divmod(len(sent), max(1, math.prod(shape)))
        if more or (sent and width not in _ROUTE_TYPES):
            raise AnswerError(f"{len(sent)} bytes of expert ids came back for routes of shape {shape}")
        if width == 4:
            self.wide_routes += 1
        flat = np.frombuffer(sent, _ROUTE_TYPES.get(width, np.uint8))
        if flat.size and not (flat.min() >= 0 and flat.max() < self.num_experts):  # before they are cut to fewer bits
            raise AnswerError(f"expert ids {flat.min()} .. {flat.max()} are outside [0, {self.num_experts})")
        return flat.reshape(shape).astype(route_dtype(self.num_experts), copy=False)


def _decode_kept(meta: dict[str, Any], count: int) -> np.ndarray:
    """[count, K] int32, -1 behind each row."""
    rows = meta.get("output_token_sampling_mask")
    if rows is None or not len(rows) == count == len(meta["output_token_sampling_logprobs"]):
        raise AnswerError(f"{None if rows is None else len(rows)} kept sets for {count} tokens")
    kept = np.full((count, max(map(len, rows), default=1)), -1, np.int32)
    for out, row in zip(kept, rows, strict=True):
        out[: len(row)] = row
    return kept


def _decode_versions(meta: dict[str, Any], count: int) -> np.ndarray:
    """[count] int32: the spans (version, start, end) of SGLang's answer, one number per token."""
    versions = np.full(count, -1, np.int32)
    for span in meta["weight_versions"]:
        versions[span["start"] : span["end"]] = int(span["version"])
    if np.any(versions < 0):
        raise AnswerError(f"weight versions {meta['weight_versions']} do not cover {count} tokens")
    return versions

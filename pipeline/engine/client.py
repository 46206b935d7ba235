"""Sampling over SGLang's HTTP interface (0.5.23): token ids in; token ids, log-probs, routes and versions out.

Everything that comes back is checked against what was asked for, because a silent slip here (a shifted route, a
missing log-prob) becomes a wrong gradient later.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import aiohttp
import numpy as np

from megatron_ext.batch.routes import check_routes, route_dtype
from pipeline import http
from pipeline.engine.control import SGLangControl
from pipeline.engine.keys import ServerKeys
from pipeline.engine.server import ServerError
from pipeline.types import FinishReason, Rollout, Sampled


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
    seed:           sample i of a group draws from the stream seed + i; needs a server with `deterministic`.
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

    def __post_init__(self):
        if self.min_p > 0 and self.seed is not None:
            raise ValueError("SGLang's scheduler dies of min_p with a seed; leave one of them out")

    def parameters(self, n: int) -> list[dict[str, Any]]:
        """SGLang's sampling_params of the n samples of a group."""
        common: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
        }
        if self.seed is None:
            return [common] * n
        return [{**common, "sampling_seed": self.seed + i} for i in range(n)]


class SGLangClient(SGLangControl):
    """One server, seen by the sampler.

    vocab_size: ids outside [0, vocab_size) are refused here; SGLang's scheduler dies of them.
    num_layers, topk, num_experts: shape and range of a route. moe_layers: those that have experts; None: all of them.
    routes=False: do not ask for routes.
    keys: that open the server; None: it has none.
    timeout_s: seconds for one call, sampling included.

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
        self._session: aiohttp.ClientSession | None = None
        self._entered = 0
        self._seeds_work: bool | None = None

    async def __aenter__(self) -> Self:
        if self._entered == 0:
            self._session = http.session(self.timeout_s)
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0 and self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(self, prompt_ids: Sequence[int] | np.ndarray, n: int, sampling: Sampling) -> list[Rollout]:
        """Sample n answers to one prompt.

        prompt_ids: [P] token ids. Returns n rollouts.
        Raises ValueError for a bad prompt, ServerError when the server fails, AnswerError when its answer is wrong.
        """
        ids = self._checked_ids(prompt_ids)
        if sampling.seed is not None:
            await self._require_seeds()
        # n copies in one request: SGLang's own `n` first runs the prompt once by itself, one round trip more.
        body = {
            "input_ids": [ids.tolist()] * n,
            "sampling_params": sampling.parameters(n),
            "return_logprob": True,
            "return_routed_experts": self.routes,
            "return_sampling_mask": sampling.return_kept,
        }
        answers = await self._post_generate(body)
        if not isinstance(answers, list) or len(answers) != n:
            raise AnswerError(f"{n} samples asked for, got {len(answers) if isinstance(answers, list) else answers}")
        parts = [self._sampled(answer, sampling, len(ids) - 1) for answer in answers]
        return [self._checked(lambda part=part: Rollout.begun(ids, part)) for part in parts]

    async def extend(self, rollout: Rollout, sampling: Sampling) -> Rollout:
        """Go on with an interrupted rollout, `sampling.max_new_tokens` tokens more at most.

        Only routes of tokens that have none yet are asked for and appended: the server would answer with what its KV
        cache holds, and that is whichever forward filled it last. Errors as in `generate`.
        """
        ids = self._checked_ids(rollout.token_ids)
        if sampling.seed is not None:
            await self._require_seeds()
        start = len(ids) - 1  # the last sampled token was never an input, so it has no row yet
        body = {
            "input_ids": ids.tolist(),
            "sampling_params": sampling.parameters(1)[0],
            "return_logprob": True,
            "return_routed_experts": self.routes,
            "routed_experts_start_len": start,
            "return_sampling_mask": sampling.return_kept,
        }
        answer = await self._post_generate(body)
        part = self._sampled(answer, sampling, 0)
        return self._checked(lambda: rollout.extended(part))

    async def score(self, token_ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probs and routes of a given sequence, by one prefill at temperature 1; nothing is sampled.

        token_ids: [T]. Returns log p(token t | tokens < t) for t = 1 .. T-1, [T-1] float32, and the routes of the
        tokens 0 .. T-2, [T-1, layers, topk] (None where the client asks for none). Errors as in `generate`.
        """
        ids = self._checked_ids(token_ids)
        body = {
            "input_ids": ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,  # from the first token on, and past the prefix cache
            "return_routed_experts": self.routes,
        }
        meta = (await self._post_generate(body))["meta_info"]
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

    async def _post_generate(self, body: dict[str, Any]) -> Any:
        if self._session is None:
            raise RuntimeError("sample inside `async with client:`")
        try:
            headers = http.bearer(self._key("/generate"))
            async with self._session.post(f"{self.url}/generate", json=body, headers=headers) as response:
                if response.status != 200:
                    reason = (await response.text())[:1000]
                    raise ServerError(f"{self.url}/generate answered {response.status}: {reason}{self._see_log()}")
                return await response.json(content_type=None)
        except TimeoutError as error:
            raise ServerError(f"{self.url}/generate took more than {self.timeout_s:g} s{self._see_log()}") from error
        except http.HttpError as error:
            raise ServerError(f"{self.url}/generate was cut off: {error!r}{self._see_log()}") from error

    def _sampled(self, answer: dict[str, Any], sampling: Sampling, route_rows: int) -> Sampled:
        """What one answer brings. route_rows: of its routes, but for those of the tokens that were sampled.

        Raises AnswerError for what was not asked for; `Rollout` checks what it makes of the rest.
        """
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in get_args(FinishReason):
            raise AnswerError(f"unknown finish reason {meta['finish_reason']}")
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
        return Sampled(
            ids=ids,
            logprobs=np.array(logprobs, np.float32),
            routes=self._decode_routes(meta, route_rows + count),
            weight_versions=_decode_versions(meta, count),
            finish_reason=reason,
            kept=kept,
            retractions=int(meta.get("num_retractions") or 0),
        )

    def _checked(self, make: Callable[[], Rollout]) -> Rollout:
        """A rollout whose tokens and routes are the model's. Raises AnswerError for another."""
        try:
            rollout = make()
            rollout.check_model(self, self.vocab_size)
        except ValueError as error:
            hint = ""
            if "twice" in str(error):
                hint = (
                    ": the server did not capture that layer's routes; set replay=none or r2, or another MoE backend "
                    "(server.extra_args)"
                )
            raise AnswerError(f"{error}{hint}") from error
        return rollout

    def _decode_routes(self, meta: dict[str, Any], rows: int) -> np.ndarray | None:
        """[rows, layers, topk] uint8 where that holds every expert id, else int16."""
        if not self.routes:
            return None
        if meta.get("routed_experts") is None:
            raise AnswerError("no routes came back: was the server started with return_routed_experts?")
        flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
        shape = (rows, self.num_layers, self.topk)
        if flat.size != np.prod(shape):
            raise AnswerError(f"{flat.size} expert ids came back for routes of shape {shape}")
        if flat.size and not (flat.min() >= 0 and flat.max() < self.num_experts):  # before they are cut to fewer bits
            raise AnswerError(f"expert ids {flat.min()} .. {flat.max()} are outside [0, {self.num_experts})")
        return flat.reshape(shape).astype(route_dtype(self.num_experts))


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

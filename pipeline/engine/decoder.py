"""What SGLang's answers to /generate hold: decoded, and checked against the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pybase64

from megatron_ext.batch.routes import MISSING, check_routes, route_dtype
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.types import FinishReason, Sampled

_ROUTE_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32}  # by the bytes of an expert id


class AnswerError(ServerError):
    """The server answered, but not what was asked for."""


class Decoder:
    """Of the answers of one server.

    vocab_size: of the model. num_layers, topk, num_experts: shape and range of a route. moe_layers: those that have
    experts. routes: whether answers have any.
    wide_routes: answers so far whose routes came as SGLang's own int32, and not in the narrowest type, as the servers
        of this project send them (`inside/hooks.py`).
    """

    def __init__(
        self, *, vocab_size: int, num_layers: int, topk: int, num_experts: int, moe_layers: Sequence[int], routes: bool
    ):
        self.vocab_size, self.num_layers, self.topk, self.num_experts = vocab_size, num_layers, topk, num_experts
        self.moe_layers, self.routes = list(moe_layers), routes
        self.wide_routes = 0

    def sampled(self, answer: dict[str, Any], sampling: Sampling, route_rows: int) -> Sampled:
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
        if reason == "abort" and not sampling.ignore_eos and ids[-1] in sampling.stop_token_ids:
            reason = "stop"  # the abort came with its last token; this project's servers say so themselves
        pairs = meta["output_token_logprobs"]
        if [pair[1] for pair in pairs] != answer["output_ids"]:
            raise AnswerError(f"{len(pairs)} log-probs do not belong to the {count} tokens of the answer")
        kept, logprobs = None, [pair[0] for pair in pairs]
        if sampling.return_kept:
            kept, logprobs = _decode_kept(meta, count), meta["output_token_sampling_logprobs"]
        part = Sampled(
            ids=ids,
            logprobs=np.array(logprobs, np.float32),
            routes=self.decoded_routes(meta, route_rows + count) if sampling.with_routes else None,
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

    def decoded_routes(self, meta: dict[str, Any], rows: int) -> np.ndarray | None:
        """[rows, layers, topk] uint8 where that holds every expert id, else int16; int16 too where rows are missing."""
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
        least = flat.min() if flat.size else 0
        if flat.size and not (least >= MISSING and flat.max() < self.num_experts):  # before they are cut to fewer bits
            raise AnswerError(f"expert ids {least} .. {flat.max()} are outside [0, {self.num_experts})")
        dtype = np.dtype(np.int16) if least == MISSING else route_dtype(self.num_experts)
        return flat.reshape(shape).astype(dtype, copy=False)


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

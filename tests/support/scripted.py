"""An engine that says what it is told."""

from __future__ import annotations

import asyncio

import numpy as np

from pipeline.engine.sampling import Piece, unheard
from pipeline.types import Sampled


def logprob_at(place: int) -> float:
    """Of the token at this place of a sequence; exact in float32, and no other place's."""
    return -1 - place / 4096


class Scripted:
    """An engine that says what it is told, in tokens that the tokenizer would not have made: one a character. Their
    log-probs are `logprob_at` their places.

    asked: token ids and routes_from of each request.  cut: longest request, tokens, after which it is aborted.
    """

    def __init__(self, tokenizer, said, cut=10**6):
        self.tokenizer, self.said, self.cut = tokenizer, list(said), cut
        self.asked, self.rest = [], []

    def ids(self, text):
        specials = self.tokenizer.all_special_tokens + list(self.tokenizer.get_added_vocab())
        out, i = [], 0
        while i < len(text):
            special = next((s for s in specials if text.startswith(s, i)), None)
            out += [self.tokenizer.convert_tokens_to_ids(special)] if special else self.tokenizer(text[i])["input_ids"]
            i += len(special or "x")
        return out

    async def between(self):
        """Two tokens of which each is heard."""

    async def sample(self, token_ids, sampling, *, routes_from=0, group=None, on_tokens=unheard):
        await asyncio.sleep(0)
        self.asked.append((np.array(token_ids), routes_from))
        if not self.rest:
            self.rest = self.ids(self.said.pop(0))
        most = min(self.cut, sampling.max_new_tokens)
        ids, self.rest = np.array(self.rest[:most], np.int32), self.rest[most:]
        reason = "stop" if not self.rest else ("length" if most == sampling.max_new_tokens else "abort")
        self.rest = [] if reason == "length" else self.rest
        if sampling.each_token:
            for i, token in enumerate(ids.tolist()):
                place = len(token_ids) + i
                on_tokens(Piece(place, (token,), (logprob_at(place),), reason == "stop" and i == len(ids) - 1))
                await self.between()
        rows = len(token_ids) + len(ids) - 1 - routes_from
        routes = (np.arange(routes_from, routes_from + rows) % 8).astype(np.uint8)[:, None, None]
        logprobs = np.array([logprob_at(len(token_ids) + i) for i in range(len(ids))], np.float32)
        return Sampled(ids, logprobs, routes, np.zeros(len(ids), np.int32), reason)

"""How the answers of a request are drawn, and what is heard of one before it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
    each_token:     pieces of one token are heard of, and not of hundreds: it costs the server more than the token.
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
    each_token: bool = False

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
        if self.each_token:
            chosen["stream_interval"] = 1
        return chosen if self.seed is None else chosen | {"sampling_seed": self.seed}


@dataclass(frozen=True)
class Piece:
    """Tokens of an answer that have just come.

    at: place of the first in the whole sequence. Where it is not behind those heard of before, their answer is lost,
        and another one begins.
    ids, logprobs: of each.  ended: the last one is a stop token.
    """

    at: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool = False


OnTokens = Callable[[Piece], None]


def unheard(piece: Piece) -> None:
    """Nobody listens."""

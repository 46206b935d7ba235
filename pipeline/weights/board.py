"""What trainer ranks that send weights at the same time tell each other: a store that rank 0 serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from megatron_ext.hf.bucket import Bucket
from megatron_ext.meeting import tcp_store
from pipeline.weights.differences import TensorSum

_FAILED = "failed"


@dataclass(frozen=True)
class Meeting:
    """Where senders and servers meet, and in which groups.

    senders: trainer ranks, rank 0 first; each has a group of its own with every rank of every server.
    world: ranks of such a group; the sender is its rank 0. backend: "gloo" or "nccl".
    """

    host: str
    port: int
    senders: tuple[int, ...]
    name: str
    world: int
    backend: str
    timeout_s: float

    def group(self, number: int) -> str:
        """Of a sender, by its number."""
        return f"{self.name}_{number}"

    def store(self) -> Any:
        """A connection to the store. Raises RuntimeError where rank 0 is gone."""
        return tcp_store(self.host, self.port, rank=1, ranks=None, timeout=timedelta(seconds=self.timeout_s))


@dataclass(frozen=True)
class Tensors:
    """Tensors of one bucket, in the order in which their bytes come: (name, dtype, shape)."""

    described: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, bucket: Bucket) -> Tensors:
        return cls(tuple((n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in bucket))

    def __len__(self) -> int:
        return len(self.described)


@dataclass(frozen=True)
class Round:
    """What a sender has ready. sums: of its tensors, where this transfer is compared."""

    version: int
    buckets: tuple[Tensors, ...]
    sums: tuple[TensorSum, ...] = ()

    def to_json(self) -> str:
        return json.dumps([self.version, [b.described for b in self.buckets], [asdict(s) for s in self.sums]])

    @classmethod
    def from_json(cls, text: str | bytes) -> Round:
        version, buckets, sums = json.loads(text)
        described = tuple(Tensors(tuple((n, d, tuple(shape)) for n, d, shape in bucket)) for bucket in buckets)
        return cls(version, described, tuple(TensorSum(**s | {"shape": tuple(s["shape"])}) for s in sums))


@dataclass(frozen=True)
class Failure:
    """Why a transfer ends. sender: who said so. lasting: to send again mends nothing."""

    words: str
    sender: int
    lasting: bool


class Board:
    """One sender's view of it. store: a connection of its own, for calls wait for each other."""

    def __init__(self, store: Any):
        self.store = store

    def tell(self, transfer: int, number: int, sender: int, ready: Round) -> None:
        """Rank 0 may announce what this sender has ready in a round."""
        self.store.set(f"{transfer}/{number}/{sender}", ready.to_json())

    def heard(self, transfer: int, number: int, sender: int) -> Round | None:
        """What a sender has ready in a round, once; None: it has not said so yet."""
        key = f"{transfer}/{number}/{sender}"
        if not self.store.check([key]):
            return None
        words = self.store.get(key)
        self.store.delete_key(key)
        return Round.from_json(words)

    def fail(self, failure: Failure) -> None:
        """Tell all that the transfer ends; rank 0 has its word of its own, which counts more."""
        self.store.set(_key(failure.sender), json.dumps(asdict(failure)))

    def failure(self, senders: Sequence[int]) -> Failure | None:
        """What the first of these has said that has failed."""
        for sender in senders:
            if self.store.check([_key(sender)]):
                return Failure(**json.loads(self.store.get(_key(sender))))
        return None


def _key(sender: int) -> str:
    return f"{_FAILED}/{sender}"

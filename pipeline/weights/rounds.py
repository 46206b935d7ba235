"""What a sender has ready in a round, what has come of all senders, and what one has sent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ext.hf.bucket import Bucket
from pipeline.weights.board import Round, Tensors
from pipeline.weights.differences import tensor_sums
from pipeline.weights.servers import WeightCheckError

_NAMED = 10  # tensors named in an error


def widest_first(bucket: Bucket) -> Bucket:
    """SGLang reads every tensor where the last one ends, and wants it aligned: widest types first."""
    return sorted(bucket, key=lambda item: -item[1].dtype.itemsize)


def make_round(buckets: Sequence[Bucket], version: int, *, checked: bool) -> Round:
    """checked: with the checksums of the tensors."""
    sums = tuple(each for bucket in buckets for each in tensor_sums(bucket)) if checked else ()
    return Round(version, tuple(Tensors.of(widest_first(bucket)) for bucket in buckets), sums)


class Arrived:
    """Holds several senders to it: each tensor comes once, from one of them. names: of all; none: it is not asked."""

    def __init__(self, names: frozenset[str]):
        self.names, self.sender_of = names, dict[str, int]()

    def add(self, sender: int, ready: Round, version: int) -> None:
        """Raises WeightCheckError for another version than this, and for a tensor that comes twice or has no place."""
        if ready.version != version:
            raise WeightCheckError(
                f"trainer rank {sender} sends weights of version {ready.version}, and rank 0 of version {version}"
            )
        for name, _, _ in (each for bucket in ready.buckets for each in bucket.described) if self.names else ():
            if name in self.sender_of:
                raise WeightCheckError(f"trainer ranks {self.sender_of[name]} and {sender} both send {name}")
            if name not in self.names:
                raise WeightCheckError(f"trainer rank {sender} sends {name}, which the model does not have")
            self.sender_of[name] = sender

    def all(self) -> None:
        """Raises WeightCheckError for tensors that did not come."""
        missing = sorted(self.names - self.sender_of.keys())
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise WeightCheckError(f"no trainer rank sends {', '.join(missing[:_NAMED])}{more}")


@dataclass
class Sent:
    """By one sender in the last transfer. seconds: from its first bucket to the servers' answer to its last."""

    nbytes: int = 0
    seconds: float = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around a transfer."""
        self.nbytes, began = 0, time.perf_counter()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - began

    def add(self, bucket: Bucket) -> None:
        self.nbytes += sum(tensor.nbytes for _, tensor in bucket)

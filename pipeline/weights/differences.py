"""Which tensors a server holds otherwise than the trainer, by Hugging Face name; only checksums travel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from megatron_ext.hf.bucket import Bucket
from pipeline.engine.checksum import MODULUS, checksum
from pipeline.engine.control import SGLangControl


@dataclass(frozen=True)
class TensorSum:
    """A tensor of the trainer, without its numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    checksum: int


@dataclass(frozen=True)
class WeightDifference:
    """name: Hugging Face's; of an `unreached` parameter, SGLang's. server: its URL.

    differs:   the server holds other numbers.
    ignored:   the server has no place for a tensor of this name, or for a part of it.
    unreached: a parameter of the server that no tensor of the trainer goes to, and that is none of its own.
    """

    name: str
    server: str
    kind: Literal["differs", "ignored", "unreached"]

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} at {self.server})"


def tensor_sums(bucket: Bucket) -> list[TensorSum]:
    """Checksums of a bucket of whole tensors."""
    return [
        TensorSum(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel(), checksum(t))
        for name, t in bucket
    ]


def weight_differences(
    buckets: Iterable[Bucket], servers: Sequence[SGLangControl], own: Sequence[str] = ()
) -> list[WeightDifference]:
    """Every tensor that some server holds otherwise than `buckets` do, bit for bit; an empty list where all agree.

    buckets: the whole model under Hugging Face names, in the dtypes that were sent. servers: idle meanwhile. own: how
    the names of those of their parameters begin that no transfer brings.
    Raises ServerError where a server does not answer, or cannot tell what it holds (quantized weights).
    """
    return compare_sums([tensor_sums(bucket) for bucket in buckets], servers, own)


def compare_sums(
    sums: Sequence[list[TensorSum]], servers: Sequence[SGLangControl], own: Sequence[str] = ()
) -> list[WeightDifference]:
    """`weight_differences` of tensors that are known by their checksums; one call a bucket, all servers at a time."""
    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        found = pool.map(lambda server: _of_server(sums, server, tuple(own)), servers)
        return [difference for each in found for difference in each]


def _of_server(sums: Sequence[list[TensorSum]], server: SGLangControl, own: tuple[str, ...]) -> list[WeightDifference]:
    found, reached = [], set[str]()
    for bucket in sums:
        ranks = server.held_weights([(t.name, t.dtype, t.shape) for t in bucket])
        for tensor in bucket:
            kind = _compare(tensor, [rank.tensors[tensor.name] for rank in ranks])
            if kind is not None:
                found.append(WeightDifference(tensor.name, server.url, kind))
        reached |= {name for rank in ranks for name in rank.parameters}
    everything = {name for rank in server.held_weights([]) for name in rank.parameters}
    unreached = sorted(name for name in everything - reached if not name.startswith(own))
    return found + [WeightDifference(name, server.url, "unreached") for name in unreached]


def _compare(tensor: TensorSum, held: Sequence[tuple[int, int]]) -> Literal["differs", "ignored"] | None:
    """held: of each rank of the server, (elements, checksum of these).

    Ranks hold disjoint pieces, or each piece is held by equally many of them.
    """
    copies, rest = divmod(sum(elements for elements, _ in held), tensor.elements)
    if not copies or rest:
        return "ignored"
    return "differs" if sum(value for _, value in held) % MODULUS != copies * tensor.checksum % MODULUS else None

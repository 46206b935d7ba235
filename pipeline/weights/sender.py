"""The trainer's weights to the running servers, from trainer rank 0.

    begin on every server, while the first bucket is made; each bucket, as the transport takes it; then, side by side,
    end, flush the prefix cache (it belongs to the old weights), name the version; now and then, compare what the
    servers hold with what was sent.

Weights travel under their Hugging Face names; the caller bounds the bytes of a bucket. Other ranks may send at the same
time (`further_sender.py`); this one waits in each round for what they have ready, and says it to the servers with its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_ext.hf.bucket import Bucket
from pipeline.config.weights import WeightsConfig
from pipeline.engine.control import ServerAddress, UnreachableError
from pipeline.engine.server import ServerError
from pipeline.weights.board import Meeting
from pipeline.weights.differences import TensorSum, WeightDifference, compare_sums, tensor_sums
from pipeline.weights.rounds import Arrived, Sent, make_round, widest_first
from pipeline.weights.servers import Servers, WeightCheckError, WeightTransferError
from pipeline.weights.transports import make_transport

_NAMED = 10  # differing tensors named in an error


class WeightSender:
    """Sends weights to servers. Lives in trainer rank 0; `connect` once, then `send` as often as there are weights."""

    def __init__(
        self,
        addresses: Sequence[ServerAddress],
        config: WeightsConfig,
        *,
        device: str,
        senders: Sequence[int] = (0,),
        names: frozenset[str] = frozenset(),
        own: Sequence[str] = (),
    ):
        """addresses: of the servers. device: "cpu" or "cuda", where the weights are. senders: trainer ranks that have a
        share of them each, this one first. names: of all tensors that come, where there are several. own: how the names
        of those of the servers' parameters begin that no transfer brings."""
        self.config, self.names, self.own = config, names, own
        self.servers = Servers(addresses, timeout_s=config.timeout_s)
        self.transport = make_transport(config.transport, self.servers, device, senders)
        self.sent, self.transfers = Sent(), 0

    def offer(self) -> Meeting | None:
        """Where the other senders are to come while this one connects; None: it is the only one. Raises
        WeightTransferError where a server does not answer."""
        return self.transport.offer()

    def connect(self) -> None:
        """Make what the transport needs. Raises WeightTransferError where a server does not join in time."""
        self.transport.connect()

    def send(self, buckets: Iterable[Bucket], version: int, *, flush: bool = True) -> None:
        """`send_rounds`, of buckets that come one after another."""
        self.send_rounds(([bucket] for bucket in buckets), version, flush=flush)

    def send_rounds(self, rounds: Iterable[Sequence[Bucket]], version: int, *, flush: bool = True) -> None:
        """Replace the weights of every server and name them. No request may get on meanwhile.

        rounds: lists of buckets, (Hugging Face name, tensor) lists each; of several senders each has as many rounds.
        flush: empty the prefix cache, of which no request may hold a part; else its entries are found no more, for they
        have the keys of older weights. Raises WeightTransferError with the server and its reason; the servers must not
        be used after that. And WeightCheckError where senders do not agree on what they send.
        """
        sums: list[list[TensorSum]] = []
        self.transfers += 1
        with self.transport.told(), self.sent.measured():
            begun = self.servers.ask("/begin_weight_update")
            try:
                self._send_all(rounds, version, sums, begun)
            finally:
                self.transport.release()
        last = self.servers.ask("/end_weight_update") + (self.servers.ask("/flush_cache") if flush else [])
        last += self.servers.ask("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.servers.answers(last)
        if sums:
            self._check(sums, version)

    def _send_all(
        self,
        rounds: Iterable[Sequence[Bucket]],
        version: int,
        sums: list[list[TensorSum]],
        begun: Sequence[Future[Any]],
    ) -> None:
        """begun: after which servers take buckets. sums: gets the checksums of what is sent, where that is asked."""
        senders = self.transport.senders
        arrived = Arrived(self.names if len(senders) > 1 else frozenset())
        for number, buckets in enumerate(rounds):
            mine = make_round(buckets, version, checked=self.config.checks(version))
            everyone = [mine, *self.transport.ready(self.transfers, number)]
            for rank, each in zip(senders, everyone, strict=True):
                arrived.add(rank, each, version)
                sums += [list(each.sums)] if each.sums else []
            self.servers.answers(begun)
            for turn in range(max(len(each.buckets) for each in everyone)):
                others = [(n, e.buckets[turn]) for n, e in enumerate(everyone) if n and turn < len(e.buckets)]
                bucket = widest_first(buckets[turn]) if turn < len(buckets) else []
                self.transport.send(bucket, others)
                self.sent.add(bucket)
        self.servers.answers(begun)
        arrived.all()

    def awaited(self) -> list[str]:
        """ "the server http://... does not answer, ..." for each call that is under way; from any thread."""
        return self.servers.awaited()

    def _check(self, sums: list[list[TensorSum]], version: int) -> None:
        wrong = self._compared(sums)
        if wrong:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise WeightCheckError(
                f"after the transfer of version {version} the servers do not hold what was sent: "
                + ", ".join(map(str, wrong[:_NAMED]))
                + more
            )

    def differences(self, buckets: Iterable[Bucket]) -> list[WeightDifference]:
        """Which tensors the servers hold otherwise (`weight_differences`)."""
        return self._compared([tensor_sums(bucket) for bucket in buckets])

    def _compared(self, sums: list[list[TensorSum]]) -> list[WeightDifference]:
        try:
            return compare_sums(sums, self.servers.controls, self.own)
        except UnreachableError as error:  # it has ended, and what it held with it
            raise WeightTransferError(f"a server did not say what weights it holds: {error}") from error
        except ServerError as error:
            raise WeightCheckError(
                f"a server cannot say what weights it holds (weights.checksum_every=0 does not ask): {error}"
            ) from error

    def close(self) -> None:
        """Leave the servers; those that are gone are no error. Raises WeightTransferError for one that hangs."""
        try:
            self.transport.close()
        finally:
            self.servers.close()

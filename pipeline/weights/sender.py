"""The trainer's weights to the running servers, from trainer rank 0.

    begin on every server; each bucket, as the transport takes it; end; flush the prefix cache (it belongs to the old
    weights); name the version; now and then, compare what the servers hold with what was sent.

Weights travel under their Hugging Face names; the caller bounds the bytes of a bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_ext.hf.bucket import Bucket
from pipeline.config.weights import WeightsConfig
from pipeline.engine.control import ServerAddress
from pipeline.engine.server import ServerError
from pipeline.weights.differences import TensorSum, WeightDifference, compare_sums, tensor_sums
from pipeline.weights.servers import Servers, WeightCheckError
from pipeline.weights.transports import make_transport

_NAMED = 10  # differing tensors named in an error


class WeightSender:
    """Sends weights to servers. Lives in trainer rank 0; `connect` once, then `send` as often as there are weights."""

    def __init__(self, addresses: Sequence[ServerAddress], config: WeightsConfig, *, device: str):
        """addresses: of the servers. device: "cpu" or "cuda", where the weights are."""
        self.config = config
        self.servers = Servers(addresses, timeout_s=config.timeout_s)
        self.transport = make_transport(config.transport, self.servers, device)

    def connect(self) -> None:
        """Make what the transport needs. Raises WeightTransferError where a server does not join in time."""
        self.transport.connect()

    def send(self, buckets: Iterable[Bucket], version: int, *, flush: bool = True) -> None:
        """Replace the weights of every server and name them. No request may get on meanwhile.

        buckets: (Hugging Face name, tensor) lists. flush: empty the prefix cache, of which no request may hold a part;
        else its entries are found no more, for they have the keys of older weights. Raises WeightTransferError with the
        server and its reason; the servers must not be used after that.
        """
        sums: list[list[TensorSum]] = []
        self.servers.call("/begin_weight_update")
        try:
            for bucket in buckets:
                # SGLang reads every tensor where the last one ends, and wants it aligned: widest types first.
                self.transport.send(sorted(bucket, key=lambda item: -item[1].dtype.itemsize))
                if self.config.checks(version):
                    sums.append(tensor_sums(bucket))
        finally:
            self.transport.release()
        self.servers.call("/end_weight_update")
        if flush:
            self.servers.call("/flush_cache")
        self.servers.call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        if sums:
            self._check(sums, version)

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
            return compare_sums(sums, self.servers.controls)
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

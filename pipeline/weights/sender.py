"""The trainer's weights to the running servers: trainer rank 0 and every server rank in one process group.

    begin on every server; for each bucket: announce names, dtypes and shapes over HTTP, broadcast its bytes over the
    group; end; flush the prefix cache (it belongs to the old weights); name the version.

Weights travel under their Hugging Face names; the caller bounds the bytes of a bucket.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from pipeline.rollout.control import SGLangControl
from pipeline.rollout.server import ServerError
from pipeline.weights.differences import Bucket, WeightDifference, weight_differences

_POLL_S = 0.0005
_LEAVE = "/destroy_weights_update_group"


class WeightTransferError(RuntimeError):
    """A server did not take the weights; the message names it."""


class WeightSender:
    """Sends weights to servers. Lives in trainer rank 0; `connect` once, then `send` as often as there are weights."""

    def __init__(
        self,
        urls: list[str],
        *,
        backend: str,
        logs: list[Path] | None = None,
        group: str = "sameroute_weights",
        timeout_s: float = 300.0,
    ):
        """urls: of the servers. backend: "gloo" or "nccl". logs: of the servers, in the same order, for error messages.

        timeout_s: of one bucket, and of every HTTP call.
        """
        self.controls = [
            SGLangControl(url, timeout_s=timeout_s, log_path=log)
            for url, log in zip(urls, logs or [None] * len(urls), strict=True)
        ]
        self.backend, self.group, self.timeout_s = backend, group, timeout_s
        self.threads = ThreadPoolExecutor(max_workers=len(urls))
        self.process_group: Any = None

    def connect(self) -> None:
        """Make the group. Raises WeightTransferError where a server does not join in time."""
        sizes = [int(self._guard(c, c.server_info)["tp_size"]) for c in self.controls]
        host = self._own_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        world, offset, joins = 1 + sum(sizes), 1, []
        for control, size in zip(self.controls, sizes, strict=True):
            body = {
                "master_address": host,
                "master_port": port,
                "rank_offset": offset,
                "world_size": world,
                "group_name": self.group,
                "backend": self.backend,
            }
            joins.append(self._later(control, "/init_weights_update_group", body))
            offset += size
        timeout = timedelta(seconds=self.timeout_s)
        try:
            # The group stands beside the trainer's own default group, which dist.new_group cannot express.
            store, _, _ = next(rendezvous(f"tcp://{host}:{port}", 0, world, timeout=timeout))
            store.set_timeout(timeout)
            self.process_group, _ = c10d._new_process_group_helper(
                world,
                0,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.group, store),
                group_name=self.group,  # pyright: ignore[reportArgumentType]
                timeout=timeout,
            )
            c10d._world.pg_group_ranks[self.process_group] = {i: i for i in range(world)}
        except (RuntimeError, ValueError) as error:
            self._answers(joins)  # a server's own refusal says more than our time-out
            raise WeightTransferError(f"the weight-transfer group was not made: {error}") from error
        self._answers(joins)

    def send(self, buckets: Iterable[Bucket], version: int) -> None:
        """Replace the weights of every server and name them. No request may be running.

        buckets: (Hugging Face name, tensor) lists. Raises WeightTransferError with the server and its reason; the
        servers must not be used after that.
        """
        self._everywhere("/begin_weight_update", {})
        for unsorted in buckets:
            # SGLang reads every tensor where the last one ends, and wants it aligned: widest types first.
            bucket = sorted(unsorted, key=lambda item: -item[1].dtype.itemsize)
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self.group,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            flat = torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
            announced = [self._later(c, "/update_weights_from_distributed", body) for c in self.controls]
            self._broadcast(flat, announced)
            self._answers(announced)
        self._everywhere("/end_weight_update", {})
        self._everywhere("/flush_cache", {})
        self._everywhere("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def differences(self, buckets: Iterable[Bucket]) -> list[WeightDifference]:
        """Which tensors the servers hold otherwise (`weight_differences`). Needs no group."""
        try:
            return weight_differences(buckets, self.controls)
        except ServerError as error:
            raise WeightTransferError(f"the weights could not be compared: {error}") from error

    def _broadcast(self, flat: Tensor, announced: list[Future[Any]]) -> None:
        """Broadcast and watch the servers meanwhile: one that refuses never takes part, and we would wait for it."""
        deadline = time.monotonic() + self.timeout_s
        try:
            work = dist.broadcast(flat, src=0, group=self.process_group, async_op=True)
            assert work is not None
            while not work.is_completed():
                self._answers([answer for answer in announced if answer.done()])
                if time.monotonic() > deadline:
                    slow = [c.url for c, a in zip(self.controls, announced, strict=True) if not a.done()]
                    what = f"{flat.numel()} bytes in {self.timeout_s:g} s"
                    raise WeightTransferError(f"{', '.join(slow)} did not take a bucket of {what}")
                time.sleep(_POLL_S)
            work.wait()
        except WeightTransferError:
            raise
        except RuntimeError as error:
            self._answers(announced)  # a server's own words say more
            raise WeightTransferError(f"the broadcast failed: {error}") from error

    def close(self) -> None:
        """Leave the group; servers that are gone are no error. Raises WeightTransferError for one that hangs."""
        group, self.process_group = self.process_group, None
        try:
            if group is not None:
                for control in self.controls:
                    if control.healthy():
                        self._guard(control, lambda c=control: c.post(_LEAVE, {"group_name": self.group}))
        finally:
            if group is not None:
                dist.destroy_process_group(group)
            self.threads.shutdown(wait=False)

    def _everywhere(self, path: str, body: dict[str, Any]) -> None:
        self._answers([self._later(control, path, body) for control in self.controls])

    def _later(self, control: SGLangControl, path: str, body: dict[str, Any]) -> Future[Any]:
        return self.threads.submit(self._guard, control, lambda: control.post(path, body))

    def _answers(self, futures: list[Future[Any]]) -> None:
        for future in futures:
            future.result()

    @staticmethod
    def _guard(control: SGLangControl, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ServerError, requests.RequestException) as error:
            raise WeightTransferError(f"weight transfer to {control.url} failed: {error}") from error

    def _own_address(self) -> str:
        """The address of this machine that the servers can reach: the one that reaches the first server."""
        host, _, port = self.controls[0].url.removeprefix("http://").partition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return probe.getsockname()[0]

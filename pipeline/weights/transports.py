"""The two ways that the bytes of a bucket take to every server.

distributed:   names, dtypes and shapes over HTTP; the bytes in one broadcast of a process group that trainer rank 0
               makes with every server rank (gloo on the CPU, NCCL on GPUs).
shared memory: the bytes lie where the server maps them, and HTTP carries the handle: a file of /dev/shm for the CPU,
               CUDA IPC for a GPU. For servers on the machine of trainer rank 0.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron_ext.hf.bucket import Bucket
from megatron_ext.meeting import tcp_store
from pipeline.weights.servers import Servers, WeightTransferError

_POLL_S = 0.0005
_LEAVE = "/destroy_weights_update_group"
logger = logging.getLogger(__name__)


class Transport(ABC):
    """One way. `connect` once, `send` each bucket, `close`."""

    def __init__(self, servers: Servers):
        self.servers = servers

    @abstractmethod
    def connect(self) -> None:
        """Make what is needed. Raises WeightTransferError where a server does not take part in time."""

    @abstractmethod
    def send(self, bucket: Bucket) -> None:
        """The tensors of a bucket, wider dtypes first, into every server, between begin and end of an update.

        Raises WeightTransferError naming the server that refuses, or that does not take them in time.
        """

    @abstractmethod
    def release(self) -> None:
        """Called when the last bucket is sent, or one has failed."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


def make_transport(kind: Literal["auto", "distributed", "shared_memory"], servers: Servers, device: str) -> Transport:
    """device: "cpu" or "cuda", of the weights. auto: shared memory where this machine runs every server."""
    if kind == "auto":
        local = all(_own_address(control.url) == _host(control.url) for control in servers.controls)
        kind = "shared_memory" if local else "distributed"
    logger.warning("weights go to %s by %s", ", ".join(c.url for c in servers.controls), kind)
    return SharedMemory(servers, device) if kind == "shared_memory" else Distributed(servers, device)


class Distributed(Transport):
    """A process group of its own, beside the trainer's."""

    def __init__(self, servers: Servers, device: str):
        super().__init__(servers)
        self.backend = "nccl" if device == "cuda" else "gloo"
        self.group = f"sameroute_weights_{secrets.token_hex(4)}"  # a server may still be in one that has failed
        self.process_group: Any = None
        self.met = self.broken = False

    def connect(self) -> None:
        controls, timeout_s = self.servers.controls, self.servers.timeout_s
        sizes = [int(self.servers.guard(c, c.server_info)["tp_size"]) for c in controls]
        host = _own_address(controls[0].url)
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        world, offset, joins = 1 + sum(sizes), 1, []
        for control, size in zip(controls, sizes, strict=True):
            body = {
                "master_address": host,
                "master_port": port,
                "rank_offset": offset,
                "world_size": world,
                "group_name": self.group,
                "backend": self.backend,
            }
            joins.append(self.servers.later(control, "/init_weights_update_group", body))
            offset += size
        timeout = timedelta(seconds=timeout_s)
        try:
            # The group stands beside the trainer's own default group, which dist.new_group cannot express.
            store = tcp_store(host, port, rank=0, ranks=world, timeout=timeout)
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
        except (OSError, RuntimeError, ValueError) as error:
            self.servers.answers(joins)  # a server's own refusal says more than our time-out
            raise WeightTransferError(f"the weight-transfer group was not made: {error}") from error
        self.servers.answers(joins)

    def send(self, bucket: Bucket) -> None:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self.group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        flat = torch.cat([_bytes(tensor) for _, tensor in bucket])
        path = "/update_weights_from_distributed"
        announced = [self.servers.later(c, path, body) for c in self.servers.controls]
        self._broadcast(flat, announced)
        self.servers.answers(announced)

    def _broadcast(self, flat: Tensor, announced: list[Future[Any]]) -> None:
        """Broadcast and watch the servers meanwhile: one that refuses never takes part, and we would wait for it."""
        deadline = time.monotonic() + self.servers.timeout_s
        try:
            work = self._begin(flat, announced, deadline)
            self._watch(work.is_completed, flat, announced, deadline)
            work.wait()
        except WeightTransferError:
            self.broken = True
            raise
        except RuntimeError as error:
            self.broken = True
            self.servers.answers(announced)  # a server's own words say more
            raise WeightTransferError(f"the broadcast failed: {error}") from error

    def _begin(self, flat: Tensor, announced: list[Future[Any]], deadline: float) -> Any:
        """The broadcast, under way. NCCL makes its communicator inside the first one, which returns when every rank has
        come: that call has a thread, beside which the servers are watched."""

        def begin() -> None:
            try:
                with torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext():
                    begun.set_result(dist.broadcast(flat, src=0, group=self.process_group, async_op=True))
            except BaseException as error:
                begun.set_exception(error)

        begun: Future[Any] = Future()
        if self.backend == "nccl" and not self.met:
            threading.Thread(target=begin, daemon=True).start()  # abandoned where a server never comes
            self._watch(begun.done, flat, announced, deadline)
        else:
            begin()
        work = begun.result()
        self.met = True
        return work

    def _watch(self, done: Callable[[], bool], flat: Tensor, announced: list[Future[Any]], deadline: float) -> None:
        while not done():
            self.servers.answers([answer for answer in announced if answer.done()])
            if time.monotonic() > deadline:
                slow = [c.url for c, a in zip(self.servers.controls, announced, strict=True) if not a.done()]
                what = f"{flat.numel()} bytes in {self.servers.timeout_s:g} s"
                raise WeightTransferError(f"{', '.join(slow)} did not take a bucket of {what}")
            time.sleep(_POLL_S)

    def release(self) -> None:
        """The group stays."""

    def close(self) -> None:
        group, self.process_group = self.process_group, None
        if group is None:
            return
        try:
            for control in self.servers.controls:
                if control.healthy():
                    self.servers.guard(control, lambda c=control: c.post(_LEAVE, {"group_name": self.group}))
        finally:
            if self.broken and self.backend == "nccl":  # to destroy it would wait for those that are gone
                c10d._abort_process_group(group)
            else:
                dist.destroy_process_group(group)


class SharedMemory(Transport):
    """One buffer a transfer, which all servers map. On a GPU a buffer a bucket: there a server's copies may outlast its
    answer, and CUDA IPC keeps a buffer until they are done."""

    def __init__(self, servers: Servers, device: str):
        super().__init__(servers)
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.sizes: list[int] = []

    def connect(self) -> None:
        self.sizes = [int(self.servers.guard(c, c.server_info)["tp_size"]) for c in self.servers.controls]
        if self.device == "cuda":
            # CUDA numbers devices by what a process sees; SGLang's handles name them by UUID.
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()

    def send(self, bucket: Bucket) -> None:
        flat = self._fill([_bytes(tensor) for _, tensor in bucket])
        places, end = [], 0
        for name, tensor in bucket:
            start, end = end, end + tensor.nbytes
            # what SGLang reads of its FlattenedTensorMetadata, whose import takes 4 s
            places.append(
                SimpleNamespace(
                    name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
                )
            )
        answers = []
        for control, size in zip(self.servers.controls, self.sizes, strict=True):
            handles = [_handle({"flattened_tensor": flat, "metadata": places}) for _ in range(size)]
            body = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", "flush_cache": False}
            answers.append(self.servers.later(control, "/update_weights_from_tensor", body))
        self.servers.answers(answers)

    def _fill(self, parts: list[Tensor]) -> Tensor:
        """[bytes of the bucket] uint8, shared."""
        size = sum(part.numel() for part in parts)
        if self.device == "cuda":
            flat = torch.cat(parts)
            torch.cuda.current_stream().synchronize()
            return flat
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8)
            with _sharing_by_name():
                self.buffer.share_memory_()
        return torch.cat(parts, out=self.buffer[:size])

    def release(self) -> None:
        """The file goes with the buffer: a rank that is killed between transfers leaves none."""
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        self.release()


@contextlib.contextmanager
def _sharing_by_name() -> Iterator[None]:
    """Share CPU memory by name, not by a file descriptor that only a child could be given."""
    before = torch_mp.get_sharing_strategy()
    torch_mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch_mp.set_sharing_strategy(before)


def _handle(content: dict[str, Any]) -> str:
    """A pickle whose tensors are handles of their memory; base64. Each may be opened once."""
    out = io.BytesIO()
    with _sharing_by_name():
        ForkingPickler(out).dump(content)
    return base64.b64encode(out.getvalue()).decode()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _host(url: str) -> str:
    host = url.removeprefix("http://").partition(":")[0]
    return socket.gethostbyname(host)


def _own_address(url: str) -> str:
    """The address of this machine that a server can reach: the one that reaches it."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]

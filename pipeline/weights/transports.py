"""The two ways that the bytes of a bucket take to every server.

distributed:   names, dtypes and shapes over HTTP; the bytes in one broadcast of a process group that a trainer rank
               makes with every server rank (gloo on the CPU, NCCL on GPUs). Several trainer ranks may do so at once.
shared memory: the bytes lie where the server maps them, and HTTP carries the handle: a file of /dev/shm for the CPU,
               CUDA IPC for a GPU. For servers on the machine of trainer rank 0.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.multiprocessing as torch_mp
from torch import Tensor

from megatron_ext.hf.bucket import Bucket
from megatron_ext.meeting import tcp_store
from pipeline.engine.control import SGLangControl
from pipeline.weights.board import Board, Failure, Meeting, Round, Tensors
from pipeline.weights.broadcast_group import BroadcastGroup, wait
from pipeline.weights.servers import Servers, WeightCheckError, WeightTransferError

LOOK_S = 0.05  # how often a rank that waits looks at whether another sender has failed
_GRACE_S = 5.0  # in which a server says why, where a sender saw it leave
_LEAVE = "/destroy_weights_update_group"
logger = logging.getLogger(__name__)


class Transport(ABC):
    """One way. `connect` once, `send` each bucket, `close`. senders: trainer ranks that take part, this one first."""

    senders: tuple[int, ...] = (0,)

    def __init__(self, servers: Servers):
        self.servers = servers

    @abstractmethod
    def connect(self) -> None:
        """Make what is needed. Raises WeightTransferError where a server does not take part in time."""

    def offer(self) -> Meeting | None:
        """Where other senders are to come before `connect`; None: there are none."""
        return None

    def ready(self, transfer: int, number: int) -> list[Round]:
        """What the other senders, in their order, have ready in this round of a transfer; waits for all."""
        return []

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Around what the other senders have to know of, where it fails."""
        return contextlib.nullcontext()

    @abstractmethod
    def send(self, bucket: Bucket, others: Sequence[tuple[int, Tensors]] = ()) -> None:
        """The tensors of a bucket, wider dtypes first, into every server, between begin and end of an update; and at
        the same time those of other senders, each under its number.

        Raises WeightTransferError naming the server that refuses, or that does not take them in time.
        """

    @abstractmethod
    def release(self) -> None:
        """Called when the last bucket is sent, or one has failed."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


def make_transport(
    kind: Literal["auto", "distributed", "shared_memory"], servers: Servers, device: str, senders: Sequence[int] = (0,)
) -> Transport:
    """device: "cpu" or "cuda", of the weights. senders: trainer ranks, rank 0 first; through shared memory it is the
    only one. auto: shared memory where this machine runs every server."""
    if kind == "auto":
        kind = "shared_memory" if all(_on_this_machine(servers, c) for c in servers.controls) else "distributed"
    many = f" from {len(senders)} ranks" if kind == "distributed" and len(senders) > 1 else ""
    logger.warning("weights go to %s by %s%s", ", ".join(c.url for c in servers.controls), kind, many)
    return SharedMemory(servers, device) if kind == "shared_memory" else Distributed(servers, device, senders)


def _on_this_machine(servers: Servers, control: SGLangControl) -> bool:
    """Whether it runs every rank of a server. Raises WeightTransferError where that does not say."""
    here = _own_address(control.url) == _host(control.url)
    return here and int(servers.guard(control, control.server_info)["nnodes"]) == 1


def flat_bytes(bucket: Bucket) -> Tensor:
    """[bytes of the bucket] uint8."""
    return torch.cat([_bytes(tensor) for _, tensor in bucket])


class Distributed(Transport):
    """A process group of each sender, beside the trainer's own. This rank is the first sender, and asks the servers."""

    def __init__(self, servers: Servers, device: str, senders: Sequence[int] = (0,)):
        super().__init__(servers)
        self.backend, self.senders = "nccl" if device == "cuda" else "gloo", tuple(senders)
        self.meeting: Meeting | None = None
        self.board: Board | None = None
        self.group = BroadcastGroup("", self.backend)

    def offer(self) -> Meeting | None:
        controls, timeout_s = self.servers.controls, self.servers.timeout_s
        self.sizes = [int(self.servers.guard(c, c.server_info)["tp_size"]) for c in controls]
        host = _own_address(controls[0].url)
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        name = f"sameroute_weights_{secrets.token_hex(4)}"  # a server may still be in one that has failed
        self.meeting = Meeting(host, port, self.senders, name, 1 + sum(self.sizes), self.backend, timeout_s)
        try:
            self.store = tcp_store(host, port, rank=0, ranks=None, timeout=timedelta(seconds=timeout_s))
        except (OSError, RuntimeError) as error:
            raise WeightTransferError(f"the weight-transfer group was not made: {error}") from error
        self.board = Board(self.meeting.store())
        self.group = BroadcastGroup(self.meeting.group(0), self.backend)
        return self.meeting if len(self.senders) > 1 else None

    def connect(self) -> None:
        if self.meeting is None:
            self.offer()
        with self.told():
            for number in range(len(self.senders)):
                self._make_group(number)

    def _make_group(self, number: int) -> None:
        """Of a sender; another rank's comes by itself."""
        meeting = self.meeting
        assert meeting is not None
        offset, joins = 1, []
        for control, size in zip(self.servers.controls, self.sizes, strict=True):
            body = {
                "master_address": meeting.host,
                "master_port": meeting.port,
                "rank_offset": offset,
                "world_size": meeting.world,
                "group_name": meeting.group(number),
                "backend": self.backend,
            }
            joins.append(self.servers.later(control, "/init_weights_update_group", body))
            offset += size
        if number == 0:
            try:
                self.group.join(self.store, meeting.world, meeting.timeout_s, self._watch(joins, "did not join"))
            except (OSError, RuntimeError, ValueError) as error:
                self.servers.answers(joins)  # a server's own refusal says more than our time-out
                raise WeightTransferError(f"the weight-transfer group was not made: {error}") from error
        self._hear(joins, "did not join")

    def ready(self, transfer: int, number: int) -> list[Round]:
        board, found, others = self.board, dict[int, Round](), range(1, len(self.senders))
        assert board is not None

        def all_heard() -> bool:
            for sender in others:
                if sender not in found and (words := board.heard(transfer, number, sender)) is not None:
                    found[sender] = words
            return len(found) == len(others)

        wait(all_heard, self._watch([], "", limited=False))
        return [found[sender] for sender in others]

    def send(self, bucket: Bucket, others: Sequence[tuple[int, Tensors]] = ()) -> None:
        parts = [*([(0, Tensors.of(bucket))] if bucket else []), *others]
        described = [each for _, tensors in parts for each in tensors.described]
        body = {
            "names": [name for name, _, _ in described],
            "dtypes": [dtype for _, dtype, _ in described],
            "shapes": [list(shape) for _, _, shape in described],
            "group_name": self._groups(parts),
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        path = "/update_weights_from_distributed"
        announced = [self.servers.later(c, path, body) for c in self.servers.controls]
        if bucket:
            self._broadcast(flat_bytes(bucket), announced)
        self._hear(announced, "did not take a bucket")

    def _groups(self, parts: Sequence[tuple[int, Tensors]]) -> str:
        """Of one sender, its group's name; of several, what the server's hook reads: inside/many_groups.py."""
        assert self.meeting is not None
        names = [(self.meeting.group(number), len(tensors)) for number, tensors in parts]
        return names[0][0] if len(names) == 1 else json.dumps(names)

    def _broadcast(self, flat: Tensor, announced: list[Future[Any]]) -> None:
        """Broadcast and watch the servers meanwhile: one that refuses never takes part, and we would wait for it."""
        what = f"did not take a bucket of {flat.numel()} bytes"
        try:
            self.group.broadcast(flat, self._watch(announced, what))
        except RuntimeError as error:
            self.servers.answers(announced)  # a server's own words say more
            raise WeightTransferError(f"the broadcast failed: {error}") from error

    def _hear(self, asked: list[Future[Any]], what: str) -> None:
        """Wait for the servers' answers, and for no sender that has failed."""
        if len(self.senders) > 1:
            wait(lambda: all(answer.done() for answer in asked), self._watch(asked, what, limited=False))
        self.servers.answers(asked)

    def _watch(self, asked: list[Future[Any]], what: str, *, limited: bool = True) -> Callable[[], None]:
        """What raises while we wait: a server's refusal, a sender's failure, and where `limited`, the time-out."""
        deadline = time.monotonic() + self.servers.timeout_s
        looked = time.monotonic()

        def look() -> None:
            nonlocal looked
            self.servers.answers([answer for answer in asked if answer.done()])
            now = time.monotonic()
            if limited and now > deadline:
                slow = [c.url for c, a in zip(self.servers.controls, asked, strict=True) if not a.done()]
                raise WeightTransferError(f"{', '.join(slow)} {what} in {self.servers.timeout_s:g} s")
            if len(self.senders) > 1 and now > looked + LOOK_S:
                looked = now
                self._look_at_senders(asked)

        return look

    def _look_at_senders(self, asked: list[Future[Any]]) -> None:
        assert self.board is not None
        failure = self.board.failure(self.senders[1:])
        if failure is None:
            return
        done, _ = futures.wait(asked, timeout=_GRACE_S, return_when=futures.FIRST_EXCEPTION)
        self.servers.answers(list(done))  # a server's own words say more
        raise (WeightCheckError if failure.lasting else WeightTransferError)(failure.words)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if len(self.senders) > 1 and self.board is not None:
                of_servers = isinstance(error, WeightTransferError)
                words = str(error) if of_servers else f"trainer rank 0: {type(error).__name__}: {error}"
                with contextlib.suppress(RuntimeError):
                    self.board.fail(Failure(words, 0, not of_servers or isinstance(error, WeightCheckError)))
            raise

    def release(self) -> None:
        """The groups stay."""

    def close(self) -> None:
        if self.meeting is None or self.group.process_group is None:
            return
        try:
            for control in self.servers.controls:
                if control.healthy():
                    for number in range(len(self.senders)):
                        body = {"group_name": self.meeting.group(number)}
                        self.servers.guard(control, lambda c=control, b=body: c.post(_LEAVE, b))
        finally:
            self.group.leave()


class SharedMemory(Transport):
    """One buffer a transfer, which all servers map. On a GPU a buffer a bucket: there a server's copies may outlast its
    answer, and CUDA IPC keeps a buffer until they are done."""

    def __init__(self, servers: Servers, device: str):
        super().__init__(servers)
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.sizes: list[int] = []

    def connect(self) -> None:
        told = [(control, self.servers.guard(control, control.server_info)) for control in self.servers.controls]
        for control, info in told:
            if int(info["nnodes"]) > 1:
                raise WeightTransferError(
                    f"weights.transport=shared_memory reaches one machine, and {control.url} spans {info['nnodes']}; "
                    "set weights.transport=distributed"
                )
        self.sizes = [int(info["tp_size"]) for _, info in told]
        if self.device == "cuda":
            # CUDA numbers devices by what a process sees; SGLang's handles name them by UUID.
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()

    def send(self, bucket: Bucket, others: Sequence[tuple[int, Tensors]] = ()) -> None:
        assert not others
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

"""A trainer rank that sends its share of the weights at the same time as rank 0, which alone talks to the servers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from megatron_ext.hf.bucket import Bucket
from pipeline.config.weights import WeightsConfig
from pipeline.weights.board import Board, Failure, Meeting
from pipeline.weights.broadcast_group import BroadcastGroup
from pipeline.weights.rounds import Sent, make_round, widest_first
from pipeline.weights.servers import WeightCheckError, WeightTransferError
from pipeline.weights.transports import LOOK_S, flat_bytes

_PATIENCE = 4  # time-outs until this rank gives up by itself: rank 0 and the driver know sooner who stalls
_WORD_S = 10.0  # in which rank 0 says why, where this rank saw a server leave


class FurtherSender:
    """Lives in a trainer rank; `connect` while rank 0 does, then `send_rounds` whenever rank 0 does."""

    def __init__(self, meeting: Meeting, rank: int, config: WeightsConfig):
        """meeting: as rank 0 offers it. rank: this one, a sender of it."""
        self.meeting, self.rank, self.config = meeting, rank, config
        self.number, self.transfer = meeting.senders.index(rank), 0
        self.group = BroadcastGroup(meeting.group(self.number), meeting.backend)
        self.board = Board(meeting.store())
        self.sent = Sent()

    def connect(self) -> None:
        """Meet the servers. Raises WeightTransferError where that comes to nothing."""
        with self._told("the weight-transfer group was not made"):
            self.store = self.meeting.store()
            limit_s = _PATIENCE * self.meeting.timeout_s
            self.group.join(self.store, self.meeting.world, limit_s, self._watch())

    def send_rounds(self, rounds: Iterable[Sequence[Bucket]], version: int, *, flush: bool = True) -> None:
        """This rank's share, as WeightSender.send_rounds sends rank 0's. Raises what rank 0 has met with, or
        WeightTransferError where a server leaves."""
        self.transfer += 1
        with self._told("the broadcast failed"), self.sent.measured():
            for number, buckets in enumerate(rounds):
                ready = make_round(buckets, version, checked=self.config.checks(version))
                self.board.tell(self.transfer, number, self.number, ready)
                for bucket in map(widest_first, buckets):
                    self.group.broadcast(flat_bytes(bucket), self._watch())
                    self.sent.add(bucket)

    def _watch(self) -> Callable[[], None]:
        """What raises while we wait: rank 0's failure."""
        looked = time.monotonic()

        def look() -> None:
            nonlocal looked
            if time.monotonic() > looked + LOOK_S:
                looked = time.monotonic()
                self._raise_what_rank_0_says()

        return look

    def _raise_what_rank_0_says(self) -> None:
        failure = self.board.failure([0])
        if failure is not None:
            raise (WeightCheckError if failure.lasting else WeightTransferError)(failure.words)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What goes wrong inside is told to rank 0, which may know why."""
        try:
            yield
        except WeightTransferError:
            raise
        except RuntimeError as error:  # a server has left, or the trainer's own stream has failed
            words, lasting = f"trainer rank {self.rank}: {what}: {error}", not self.group.broken
            self.board.fail(Failure(words, self.rank, lasting))
            deadline = time.monotonic() + _WORD_S
            while not lasting and time.monotonic() < deadline:
                self._raise_what_rank_0_says()
                time.sleep(LOOK_S)
            if lasting:
                raise
            raise WeightTransferError(words) from error
        except BaseException as error:
            self.board.fail(Failure(f"trainer rank {self.rank}: {type(error).__name__}: {error}", self.rank, True))
            raise

    def awaited(self) -> list[str]:
        """See WeightSender.awaited: this rank asks no server."""
        return []

    def close(self) -> None:
        """Leave the servers."""
        self.group.leave()

"""Where ranks meet: at one address, and all of them come."""

from __future__ import annotations

from datetime import timedelta
from threading import Thread

import psutil
import pytest
import torch.distributed as dist

from megatron_ext.meeting import tcp_store
from tests.support.receivers import free_port
from tests.support.sockets import listening


def test_the_store_listens_at_its_host_alone_and_serves_every_rank():
    port, timeout = free_port(), timedelta(seconds=20)

    def second():
        tcp_store("127.0.0.1", port, rank=1, ranks=2, timeout=timeout).set("from", "1")

    thread = Thread(target=second)
    thread.start()
    store = tcp_store("127.0.0.1", port, rank=0, ranks=2, timeout=timeout)
    thread.join()
    assert store.get("from") == b"1"
    assert [s.address for s in listening([psutil.Process()]) if s.port == port] == ["127.0.0.1"]


def test_a_rank_that_does_not_come_and_a_port_in_use_are_errors():
    port = free_port()
    with pytest.raises(dist.DistStoreError, match=r"[Tt]imed? ?out"):
        tcp_store("127.0.0.1", port, rank=0, ranks=2, timeout=timedelta(seconds=1))
    store = tcp_store("127.0.0.1", free_port(), rank=0, ranks=1, timeout=timedelta(seconds=5))
    with pytest.raises(OSError, match="Address already in use"):
        tcp_store("127.0.0.1", store.port, rank=0, ranks=1, timeout=timedelta(seconds=5))

"""Where ranks find each other: torch's TCPStore, which listens at one address and not at all of the machine's.

torch.distributed (2.14) binds its store to every interface whatever host the ranks were told, and whoever reaches it
may read and write it. It also takes a socket that already listens.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

_BACKLOG = 2048  # connections that wait; torch's own number


def tcp_store(host: str, port: int, *, rank: int, ranks: int | None, timeout: timedelta) -> dist.TCPStore:
    """The store at host:port. Rank 0 serves it, and waits there until all ranks have come. ranks: None: for nobody.

    timeout: of that and of every later call. Raises OSError where rank 0 cannot listen there, and torch's
    DistStoreError or DistNetworkError, both RuntimeErrors, where the others do not come or nobody listens.
    """
    listener = None if rank else socket.create_server((host, port), backlog=_BACKLOG).detach()
    return dist.TCPStore(
        host,
        port,
        ranks,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=ranks is not None,
        multi_tenant=True,
        master_listen_fd=listener,
    )

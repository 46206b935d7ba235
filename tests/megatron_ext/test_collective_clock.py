"""Who waits for others is told from who keeps them waiting."""

from __future__ import annotations

import time

from megatron_ext.config import ParallelConfig
from tests.support.ranks import run_ranks


def _late(config):
    import torch
    import torch.distributed as dist

    from megatron_ext import collective_clock

    collective_clock.install()
    collective_clock.install()
    dist.barrier()
    before = collective_clock.waited()
    if dist.get_rank() == 1:
        time.sleep(0.4)
    dist.all_reduce(torch.ones(1))
    return collective_clock.waited() - before


def test_the_wait_in_a_collective_is_that_of_the_ranks_that_came_early():
    early, late = run_ranks(_late, ParallelConfig(ranks=2))
    assert 0.3 < early < 2.0
    assert late < 0.2

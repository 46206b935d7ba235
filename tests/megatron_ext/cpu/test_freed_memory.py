"""Tensors that have been freed cost no pages when others of their sizes are made."""

import resource

import torch

from tests.support.ranks import run_alone

BYTES, TOGETHER, TIMES = 8 << 20, 6, 5


def pages(keep: bool):
    """New pages of some tensors that are made and freed together, TIMES."""
    from megatron_ext.cpu.freed_memory import keep_freed_memory

    if keep:
        keep_freed_memory()
    for _ in range(TIMES):  # until each has its place
        [torch.ones(BYTES // 4) for _ in range(TOGETHER)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        [torch.ones(BYTES // 4) for _ in range(TOGETHER)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again():
    whole = TOGETHER * BYTES // resource.getpagesize()
    (kept,) = run_alone(pages, True)
    assert kept < whole / 2
    (given,) = run_alone(pages, False)
    assert given > whole  # else this proves nothing here

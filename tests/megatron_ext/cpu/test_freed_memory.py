"""Tensors that have been freed cost no pages when others of their sizes are made."""

import resource

import torch

from tests.support.ranks import run_alone

BYTES, TOGETHER, TIMES = 8 << 20, 6, 5


def pages():
    """New pages of some tensors that are made and freed together, TIMES."""
    from megatron_ext.cpu.freed_memory import keep_freed_memory

    keep_freed_memory()
    for _ in range(TIMES):  # until each has its place
        [torch.ones(BYTES // 4) for _ in range(TOGETHER)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        [torch.ones(BYTES // 4) for _ in range(TOGETHER)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again():
    (found,) = run_alone(pages)
    # A fresh process that keeps nothing asks for all of them TIMES; one with other things in its heap may not.
    assert found < TOGETHER * BYTES // resource.getpagesize() / 2

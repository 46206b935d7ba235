"""Storages that were away are as they were, and so is every view of them."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.host_copy import HostCopy, storages

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
def test_bytes_come_back_and_views_stay_views(block):
    whole = torch.randn(101)
    part, other, dropped = whole[3:50].view(47, 1), torch.arange(7, dtype=torch.bfloat16), torch.ones(9)
    before = whole.clone()
    host = HostCopy(CPU, block)
    for _ in range(2):
        host.take([whole, part, other], dropped=[dropped, dropped[2:], whole])
        assert host.away
        assert [t.untyped_storage().nbytes() for t in (whole, part, other, dropped)] == [0, 0, 0, 0]
        held = host.bytes
        host.give_back()
        assert not host.away
        assert torch.equal(whole, before)
        assert torch.equal(part[:, 0], before[3:50])
        assert other.tolist() == list(range(7))
        assert dropped.tolist() == [0.0] * 9
        dropped.fill_(1)
        part += 1
        assert torch.equal(whole[3:50], before[3:50] + 1)
        before = whole.clone()
    assert held == host.bytes == -(-(101 * 4 + 7 * 2) // block) * block  # kept, and no more than one block too much


def test_other_devices_and_storages_that_are_away_are_left_alone():
    away, meta = torch.ones(3), torch.empty(5, device="meta")
    first = HostCopy(CPU, 64)
    first.take([away])
    assert storages([away, meta], CPU) == []
    second = HostCopy(CPU, 64)
    second.take([away, meta])
    assert not second.away
    with pytest.raises(AssertionError, match="already"):
        first.take([away])

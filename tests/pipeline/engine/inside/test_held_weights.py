"""A loader run backwards gives what it was given, whatever views, joins and casts it made; others are refused."""

import pytest
import torch
from torch import nn

from pipeline.engine.checksum import MODULUS, checksum
from pipeline.engine.inside.held_weights import CannotReadBackError, held_checksums

GATE, UP, NORM = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4).bfloat16()
DESCRIBED = [("gate", "float32", [6, 4]), ("up", "float32", [6, 4]), ("norm", "bfloat16", [4])]


class Server(nn.Module):
    """One of two tensor-parallel ranks: half of the rows of gate and up, joined; the norm whole, in float32."""

    def __init__(self, rank: int, how: str):
        super().__init__()
        self.rank, self.how = rank, how
        self.joined, self.norm = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4))

    def load_weights(self, weights):
        parts = dict(weights)
        rows = slice(3 * self.rank, 3 * self.rank + 3)
        if self.how == "views":
            self.joined.data[:3].copy_(parts["gate"][rows])
            self.joined.data[3:] = parts["up"].narrow(0, 3 * self.rank, 3)
        elif self.how == "joined and cast":
            self.joined.data.copy_(torch.cat([parts["gate"][rows], parts["up"][rows]]).contiguous())
            self.norm.data.copy_(parts["norm"].to(torch.float32))
            return
        elif self.how == "transposed":
            self.joined.data.t()[:, :3].copy_(parts["gate"].t()[:, rows])
            self.joined.data.t()[:, 3:].copy_(parts["up"].t()[:, rows].contiguous())
        elif self.how == "scaled":
            self.joined.data.copy_(parts["gate"] * 2)
        elif self.how == "read":
            self.joined.data.fill_(parts["gate"][0, 0].item())
        self.norm.data.copy_(parts["norm"])


def loaded(how: str) -> list[Server]:
    servers = [Server(rank, how) for rank in range(2)]
    for server in servers:
        server.load_weights([("gate", GATE), ("up", UP), ("norm", NORM)])
    return servers


@pytest.mark.parametrize("how", ["views", "joined and cast", "transposed"])
def test_the_pieces_of_two_ranks_add_up_to_what_was_loaded(how):
    first, second = (held_checksums(server, DESCRIBED) for server in loaded(how))
    assert first[1] == second[1] == ["joined", "norm"]
    for name, tensor in (("gate", GATE), ("up", UP)):
        assert [answer[0][name][0] for answer in (first, second)] == [12, 12]
        assert sum(answer[0][name][1] for answer in (first, second)) % MODULUS == checksum(tensor)
    assert first[0]["norm"] == second[0]["norm"] == (4, checksum(NORM))


@pytest.mark.parametrize("how", ["scaled", "read"])
def test_a_loader_that_computes_is_refused_and_changes_nothing(how):
    server = loaded("views")[0]
    before, server.how = {n: p.clone() for n, p in server.named_parameters()}, how
    with pytest.raises(CannotReadBackError, match="the loader"):
        held_checksums(server, DESCRIBED)
    assert all(torch.equal(p, before[n]) for n, p in server.named_parameters())


def test_a_name_without_a_place_holds_nothing():
    found, _ = held_checksums(loaded("views")[0], [*DESCRIBED, ("stray", "float32", [3])])
    assert found["stray"] == (0, 0)


def test_a_checksum_sees_every_bit_and_place():
    tensor = torch.randn(1000, dtype=torch.float64).float()
    sums = {checksum(tensor)}
    for place in range(0, 1000, 37):
        for bit in (0, 13, 31):
            changed = tensor.clone()
            changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
            sums.add(checksum(changed))
    sums.add(checksum(tensor.flip(0)))
    assert len(sums) == 2 + 3 * len(range(0, 1000, 37))

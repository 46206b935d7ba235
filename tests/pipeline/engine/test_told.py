"""A server that dies in the middle of an answer of which each token was told: another goes on from there."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pipeline.engine.control import UnreachableError
from pipeline.engine.sampling import Piece, Sampling
from pipeline.types import Sampled
from tests.support.fake_servers import Server, fleet_of

TOLD = Sampling(max_new_tokens=5, temperature=1.0, each_token=True)


class Dies:
    """Says 100, 101, ... by the place of each, tells of them, and dies after two where it is the first. asked: what
    each request had."""

    def __init__(self, update=lambda: None):
        self.asked, self.update = [], update

    async def sample(self, ids, sampling, *, routes_from=0, on_tokens):
        self.asked.append((list(ids), sampling.max_new_tokens, routes_from))
        said = [100 + len(ids) + i for i in range(sampling.max_new_tokens)]
        for i, token in enumerate(said):
            on_tokens(Piece(len(ids) + i, (token,), (-float(len(self.asked)),)))
            if len(self.asked) == 1 and i == 1:
                self.update()
                raise UnreachableError("reset by peer")
        rows = len(ids) + len(said) - 1 - routes_from
        return Sampled(
            np.array(said, np.int32),
            np.full(len(said), -float(len(self.asked)), np.float32),
            np.arange(routes_from, routes_from + rows, dtype=np.uint8)[:, None, None],
            np.zeros(len(said), np.int32),
            "length",
        )


def sampled(sampling, update=lambda fleet: None):
    """(the answer after 1, 2, 3; pieces that were heard; requests)"""

    async def run():
        server, heard = Server("a"), []
        fleet = fleet_of(server)
        engine = Dies(lambda: update(fleet))
        server.sample = engine.sample
        async with fleet:
            return await fleet.sample([1, 2, 3], sampling, routes_from=2, on_tokens=heard.append), heard, engine.asked

    return asyncio.run(run())


def test_another_server_goes_on_from_what_was_told_and_routes_are_of_all_tokens():
    part, heard, asked = sampled(TOLD)
    assert asked == [([1, 2, 3], 5, 2), ([1, 2, 3, 103, 104], 3, 2)]
    assert part.ids.tolist() == [103, 104, 105, 106, 107] == [token for piece in heard for token in piece.ids]
    assert part.logprobs.tolist() == [-1, -1, -2, -2, -2] == [value for piece in heard for value in piece.logprobs]
    assert part.routes[:, 0, 0].tolist() == list(range(2, 7))
    assert part.weight_versions.tolist() == [0] * 5
    assert [piece.at for piece in heard] == [3, 4, 5, 6, 7]


def begins_anew(part, heard, asked):
    assert asked == [([1, 2, 3], 5, 2)] * 2
    assert part.logprobs.tolist() == [-2] * 5
    assert [piece.at for piece in heard] == [3, 4, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("changed", [{"each_token": False}, {"return_kept": True, "top_k": 4}])
def test_what_nobody_was_told_or_what_pieces_do_not_have_is_sampled_anew(changed):
    begins_anew(*sampled(Sampling(**{"max_new_tokens": 5, "temperature": 1.0, "each_token": True} | changed)))


def test_under_other_weights_the_answer_begins_anew():
    def update(fleet):
        fleet._version += 1

    with pytest.raises(Exception, match="tokens came from weights"):  # this engine says that they are of the old ones
        sampled(TOLD, update)


def test_an_answer_that_had_all_its_tokens_is_not_asked_for_none():
    part, heard, asked = sampled(Sampling(2, 1.0, each_token=True))
    assert asked == [([1, 2, 3], 2, 2)] * 2
    assert part.logprobs.tolist() == [-2] * 2
    assert [piece.at for piece in heard] == [3, 4, 3, 4]

"""A teacher's servers: one that dies is started again with what it began with, and asked again."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.client import AbortedError
from pipeline.engine.control import UnreachableError
from pipeline.engine.fleet import ServerState
from pipeline.engine.server import ServerError
from pipeline.engine.teaching.teacher_fleet import TeacherFleet
from pipeline.teaching.teacher_scores import TeacherScores
from tests.support.fake_servers import Member, Server


class Teaching(Server):
    """Dies in the middle of its second score; aborts its first."""

    scores = 0

    async def teach(self, ids, start, top_k):
        self.scores += 1
        if self.scores == 1:
            raise AbortedError("aborted")
        if self.scores == 2:
            self.living = False
            raise UnreachableError("cut off")
        return TeacherScores(np.zeros(len(ids) - start, np.float32))


def test_a_score_whose_server_dies_is_asked_again_when_it_is_back_and_no_weights_are_sent():
    async def run():
        server = Teaching("teacher")
        fleet = TeacherFleet([Member(server, server)], ServerConfig(probe_timeout_s=0.05))
        fleet.members.say = lambda _: None
        fleet.wait_ready()
        async with fleet:
            assert len(await asyncio.wait_for(fleet.teach([1, 2, 3], 1, 0), 10)) == 2
        assert (server.scores, server.starts, fleet.version) == (3, 2, 0)
        assert fleet.servers[0].state is ServerState.SERVING

    asyncio.run(run())


def test_a_server_of_somebody_elses_that_dies_ends_the_run_with_a_sentence_about_the_teacher():
    async def run():
        server, said = Teaching("teacher"), []
        fleet = TeacherFleet([Member(server, server, added=True)], ServerConfig(probe_timeout_s=0.05))
        fleet.members.say = said.append
        fleet.wait_ready()
        async with fleet:
            with pytest.raises(ServerError, match=r"^the teacher: no server takes requests: left; start the server of"):
                await asyncio.wait_for(fleet.teach([1, 2, 3], 1, 0), 10)
        assert said == ["the added server http://teacher died, and there is no other"]

    asyncio.run(run())

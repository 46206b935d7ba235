"""What a run's limits are compared with is what SGLang has room for: an answer is whole, and one token less cuts it."""

import asyncio

import pytest

from pipeline.config.server import ServerConfig, request_tokens
from pipeline.engine.client import SGLangClient
from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.rollout.session import Session
from tests.conftest import TINY

PROMPT, ANSWER = 16, 8


async def longest_request(client):
    async with client:
        return await Session(client, list(range(5, 5 + PROMPT))).sample(Sampling(ANSWER, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("field", ["context_length", "max_total_tokens"])
@pytest.mark.parametrize("missing", [0, 1])
def test_the_longest_request_is_served_whole_exactly_where_there_is_room(tiny_model_dir, tmp_path, field, missing):
    room = {"context_length": 1024} | {field: request_tokens(PROMPT, ANSWER) - missing}
    with SGLangServer(
        ServerConfig(startup_timeout_s=240, **room),
        tiny_model_dir,
        tmp_path / "sglang.log",
        device="cpu",
        seed=0,
        return_routed_experts=True,
    ) as server:
        client = SGLangClient(
            server.url,
            keys=server.keys,
            vocab_size=TINY["vocab_size"],
            num_layers=TINY["num_hidden_layers"],
            topk=TINY["num_experts_per_tok"],
            num_experts=TINY["num_experts"],
            timeout_s=120,
            log_path=server.log_path,
        )
        if missing:
            with pytest.raises(AnswerError, match=r"was cut at 7 of 8 tokens: .* raise server\.context_length"):
                asyncio.run(longest_request(client))
        else:
            assert len(asyncio.run(longest_request(client))) == ANSWER

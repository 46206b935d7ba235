"""Loss and gradient know nothing of how the turns of a conversation were split into requests."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import padded
from pipeline.engine.sampling import Sampling
from pipeline.environments.conversation import Conversation
from pipeline.loop.update import Measured, loss_rows
from pipeline.objectives import Denominators, LossInputs, ObjectiveConfig, resolve
from pipeline.step import Batch, PolicyTokens
from pipeline.types import Episode, Group, Sampled
from tests.support.scripted import Scripted
from tests.support.served import kimi_tokenizer, prompt_of

SAID = [
    ["ab<|im_end|>", "c<|im_end|>", "abcde<|im_end|>"],
    ["abc<|im_end|>", "de<|im_end|>"],
    ["c<|im_end|>", "ab<|im_end|>", "e<|im_end|>"],
]
EARNED = [(0.25, 0.0, 1.0), (0.0, 0.5), (0.0, -0.5, 0.25)]
OBJECTIVES = [
    {"preset": "gspo"},
    {"preset": "grpo", "credit": "turn"},
    {"preset": "dapo", "credit": "turn", "turn_gamma": 0.9},
    {"preset": "gspo_token", "credit": "turn"},
    {"preset": "ppo"},
    {"preset": "ppo", "credit": "turn", "gae_gamma": 0.9},
]


def noise(seed: int, places: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 that belong to a place in the conversation."""
    return (np.sin((seed + 1) * (places + 1) * 12.9898) * 43758.5453 % 1).astype(np.float32)


class Placed(Scripted):
    """Log-probs of a token belong to its place. cuts: the longest request, one after the other; then it is aborted."""

    def __init__(self, tokenizer, said, cuts):
        super().__init__(tokenizer, said)
        self.cuts = itertools.chain(cuts, itertools.repeat(10**6))

    async def sample(self, token_ids, sampling, **named):
        self.cut = next(self.cuts)
        part = await super().sample(token_ids, sampling, **named)
        places = len(token_ids) + np.arange(len(part.ids))
        return Sampled(part.ids, -noise(0, places), part.routes, part.weight_versions, part.finish_reason)


async def episode(tokenizer, number, cuts, pieces):
    """pieces: tokens that the environment asks for at a time."""
    prompt, writer = prompt_of(tokenizer)
    engine = Placed(tokenizer, SAID[number], cuts)
    talk = Conversation(engine, prompt, writer, Sampling(99, 1.0), max_turns=3, max_tokens=900)
    asked = itertools.chain(pieces, itertools.repeat(99))
    for k in range(len(SAID[number])):
        if k:
            talk.append([{"role": "tool", "content": "de", "tool_call_id": "f:0"}])
        while (limit := next(asked)) and (await piece(engine, talk, limit)).finish_reason == "length":
            pass
    return prompt, Episode(talk.rollouts, sum(EARNED[number]), turn_rewards=talk.turn_rewards(EARNED[number]))


async def piece(engine, talk, limit):
    """A turn, or its beginning; what the engine had left to say is said later."""
    whole = engine.rest = engine.rest or engine.ids(engine.said.pop(0))
    turn = await talk.sample(max_new_tokens=limit)
    engine.rest = whole[len(turn.token_ids) :]
    return turn


def learned(tokenizer, objective, cuts, pieces):
    """(ids, loss, gradient by token of each rollout)."""

    async def play():
        return [await episode(tokenizer, i, cuts[i], pieces[i]) for i in range(len(SAID))]

    played = asyncio.run(play())
    batch = Batch(1, 0, (Group(played[0][0], tuple(one for _, one in played)),))
    places = [len(r.prompt_ids) + np.arange(len(r)) for r in batch.rollouts]
    values = [noise(3, p) for p in places]
    proximal = PolicyTokens([-noise(1, p) for p in places], [], np.zeros((0, 4), np.int64))
    rows = loss_rows(objective, batch, Measured(proximal, values=values), max_new_tokens=99)
    mask = torch.from_numpy(padded([r.trained for r in batch.rollouts]))

    def matrix(arrays):
        return torch.from_numpy(padded([np.asarray(a, np.float64) for a in arrays]))

    current = matrix([-noise(1, p) - 0.1 * noise(2, p) for p in places]).requires_grad_()
    critic = {}
    if objective.needs_critic:
        critic = {"values": matrix(values), "proximal_values": matrix(values)}
        critic["returns"] = matrix([row.returns for row in rows])
    by_token = [np.broadcast_to(row.advantage, len(r)) for row, r in zip(rows, batch.rollouts, strict=True)]
    advantages = matrix(by_token) if objective.needs_turns or objective.needs_critic else matrix(by_token)[:, 0]
    counts = mask.sum().repeat(len(mask))
    x = LossInputs(
        current, matrix(proximal.logprobs), matrix([r.rollout_logprobs for r in batch.rollouts]), advantages, mask,
        prompt_tokens=counts, **critic,
    )  # fmt: skip
    loss = objective.loss(x, Denominators.of(mask, 99, prompts=1)).loss
    (gradient,) = torch.autograd.grad(loss, current)
    return [r.token_ids.tolist() for r in batch.rollouts], float(loss.detach()), gradient


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return kimi_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def whole(tokenizer):
    return [learned(tokenizer, resolve(ObjectiveConfig(**cells)), [()] * 3, [()] * 3) for cells in OBJECTIVES]


sizes = st.lists(st.lists(st.integers(1, 3), max_size=8), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(cuts=sizes, pieces=sizes, which=st.integers(0, len(OBJECTIVES) - 1))
def test_loss_and_gradient_are_the_same_however_turns_were_split(tokenizer, whole, cuts, pieces, which):
    ids, loss, gradient = whole[which]
    objective = resolve(ObjectiveConfig(**OBJECTIVES[which]))
    found_ids, found, theirs = learned(tokenizer, objective, cuts, pieces)
    assert found_ids == ids
    assert found == loss
    assert torch.equal(theirs, gradient)
    assert gradient.abs().max() > 0

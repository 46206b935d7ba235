"""Conversations of five turns with a tool's answer between them, whatever the model says, for real engines."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI

from pipeline.environments import Conversation, Reward
from pipeline.environments.endpoint import serve
from pipeline.types import Prompt, Rollout

TURNS, TURN_TOKENS = 5, 6
BLOCKING, BLOCKED_S = 1, 7.0
TOOL_S = (0.2, 2.5)  # for even prompts, and for odd ones
MODULE = Path(__file__)


def write_questions(folder: Path, count: int) -> Path:
    """Prompts that are all different."""
    rows = ({"prompt": f"question {i}", "answer": "0"} for i in range(count))
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(questions: Path, name: str, *, prompt_tokens: int = 24, tokens: int = 90, context: int = 128) -> list[str]:
    """Of a run whose environment is the class `name` of this file. prompt_tokens, tokens: that a prompt and what
    follows it may have. context: of the servers."""
    return [
        f"environment={{function: 'talks:{name}', directory: {MODULE.parent}, replies: [tool], max_turns: {TURNS}, "
        f"max_tokens: {tokens}, threads: 4}}",
        f"data={{sources: [{{kind: jsonl, path: {questions}}}], task: null, max_prompt_tokens: {prompt_tokens}}}",
        f"rollout.max_new_tokens={TURN_TOKENS}",
        f"server.context_length={context}",
    ]


def worth(ids) -> float:
    """Share of even tokens: turns differ in it."""
    return sum(int(i) % 2 == 0 for i in ids) / len(ids)


class Talk:
    """At the prompt BLOCKING the tool blocks its thread for BLOCKED_S in the second turn."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        earned: list[float] = []
        while True:
            turn = await conversation.sample()
            earned.append(worth(turn.token_ids))
            if len(earned) == TURNS:
                return Reward(turns=earned)
            if prompt.index == BLOCKING and len(earned) == 2:
                time.sleep(BLOCKED_S)
            conversation.append([{"role": "tool", "content": f"{sum(map(int, turn.token_ids))}"}])


def in_streams(prompt: Prompt) -> bool:
    """Whether OverHTTP asks for its answers as streams."""
    return bool(prompt.index // 2 % 2)


class OverHTTP:
    """The same, led by an unchanged client of the openai package, with a tool that takes its time: for half of the
    prompts so much that the others are trained on meanwhile. Half of the prompts have their answers as streams. The
    note counts the tokens that the client was told of."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        assert prompt.opening is not None
        messages, told, earned = list(prompt.opening.messages), 0, []
        async with serve(conversation) as address, AsyncOpenAI(base_url=address.url, api_key=address.key) as client:
            for turn in range(TURNS):
                ask = streamed if in_streams(prompt) else whole
                message, count, texts = await ask(client, messages)
                told += count
                earned.append(sum(len(text) % 2 == 0 for text in texts) / TURN_TOKENS)  # turns differ in it
                await asyncio.sleep(TOOL_S[prompt.index % 2])
                answer = {"role": "tool", "tool_call_id": f"f{turn}", "content": f"{prompt.index} {turn}"}
                messages += [message, answer]
        return Reward(turns=earned, note=str(told))


async def whole(client: AsyncOpenAI, messages: list) -> tuple[dict, int, list[str]]:
    """(message, tokens of it, their texts)"""
    answer = await client.chat.completions.create(model="policy", messages=messages, logprobs=True)
    texts = [entry.token for entry in answer.choices[0].logprobs.content]
    return answer.choices[0].message.model_dump(exclude_none=True), answer.usage.completion_tokens, texts


async def streamed(client: AsyncOpenAI, messages: list) -> tuple[dict, int, list[str]]:
    """The same, put together from a stream."""
    said, count, texts = "", 0, []
    async for piece in await client.chat.completions.create(
        model="policy", messages=messages, logprobs=True, stream=True, stream_options={"include_usage": True}
    ):
        for choice in piece.choices:
            said += choice.delta.content or ""
            texts += [entry.token for entry in (choice.logprobs.content if choice.logprobs else ())]
        count = piece.usage.completion_tokens if piece.usage else count
    return {"role": "assistant", "content": said}, count, texts


def split(rollout: Rollout) -> list[tuple[Rollout, slice]]:
    """Each turn as a single answer, whose prompt is all that stood before it; and where it stands."""
    before, out = len(rollout.prompt_ids), []
    for turn in range(rollout.turns):
        (places,) = np.nonzero(rollout.turn_numbers == turn)
        where = slice(int(places[0]), int(places[-1]) + 1)
        alone = Rollout(
            prompt_ids=rollout.token_ids[: before + where.start],
            response_ids=rollout.response_ids[where],
            rollout_logprobs=rollout.rollout_logprobs[where],
            routes=np.asarray(rollout.routes)[: before + where.stop - 1],
            weight_versions=rollout.weight_versions[where],
            finish_reason="stop",
        )
        out.append((alone, where))
    return out

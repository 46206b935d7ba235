"""Conversations of five turns with a tool's answer between them, whatever the model says, for real engines."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from openai import AsyncOpenAI

from pipeline.environments import Conversation, Reward
from pipeline.environments.endpoint import serve
from pipeline.types import Prompt

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


def settings(questions: Path, name: str) -> list[str]:
    """Of a run whose environment is the class `name` of this file."""
    return [
        f"environment={{function: 'talks:{name}', directory: {MODULE.parent}, replies: [tool], max_turns: {TURNS}, "
        "max_tokens: 90, threads: 4}",
        f"data={{sources: [{{kind: jsonl, path: {questions}}}], task: null, max_prompt_tokens: 24}}",
        f"rollout.max_new_tokens={TURN_TOKENS}",
        "server.context_length=128",
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


class OverHTTP:
    """The same, led by an unchanged client of the openai package, with a tool that takes its time: for half of the
    prompts so much that the others are trained on meanwhile. The note counts the tokens that the client was told of."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        assert prompt.opening is not None
        messages, told, earned = list(prompt.opening.messages), 0, []
        async with serve(conversation) as address, AsyncOpenAI(base_url=address.url, api_key=address.key) as client:
            for turn in range(TURNS):
                answer = await client.chat.completions.create(
                    model="policy", messages=messages, logprobs=True, extra_headers={"x-turn": str(turn)}
                )
                told += answer.usage.completion_tokens
                logprobs = answer.choices[0].logprobs.content
                earned.append(float(len({entry.token for entry in logprobs}) / TURN_TOKENS))
                call = f"f{turn}"
                await asyncio.sleep(TOOL_S[prompt.index % 2])
                messages += [
                    answer.choices[0].message.model_dump(exclude_none=True),
                    {"role": "tool", "tool_call_id": call, "content": f"{prompt.index} {turn}"},
                ]
        return Reward(turns=earned, note=str(told))

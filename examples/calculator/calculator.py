"""A calculator as a tool: the model may write `(37*48)`, is told `1776`, and answers.

    python examples/calculator/calculator.py runs/calculator-data     # questions, demonstrations, held-out questions

Nothing tells it to use the tool but the reward of the last answer.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from pipeline.environments import Conversation, Reward
from pipeline.types import Prompt

CALL = re.compile(r"\((\d+)\*(\d+)\)")


class Calculator:
    """Answers every call; the turn that is none is the answer."""

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        calls = 0
        turn = await conversation.sample()
        while (call := CALL.fullmatch(turn.text)) is not None:
            calls += 1
            conversation.append([{"role": "tool", "content": str(int(call[1]) * int(call[2]))}])
            turn = await conversation.sample()
        right = float(turn.text == prompt.metadata["answer"])
        return Reward(right, parts={"right": right, "calls": calls}, note=f"{calls} calls")


def demonstration(rng: random.Random, question: str, answer: str) -> dict[str, object]:
    """What the model begins with: it knows how to call and how to read a result, and mostly guesses all the same."""
    asked = {"role": "user", "content": question}
    if rng.random() < 0.5:
        call = {"role": "assistant", "content": f"({question})"}
        return {"messages": [asked, call, {"role": "tool", "content": answer}], "answer": answer}
    guess = str(rng.randrange(100, 9900))
    return {"messages": [asked], "answer": f"({question})" if rng.random() < 0.25 else guess}


def write(folder: Path, seed: int = 0) -> None:
    """Questions, demonstrations of other questions, and held-out ones, as JSON lines."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    asked = [(f"{a}*{b}", str(a * b)) for a, b in pairs]
    rows = {
        "held_out": [{"prompt": q, "answer": a} for q, a in asked[:64]],
        "questions": [{"prompt": q, "answer": a} for q, a in asked[64:2064]],
        "demonstrations": [demonstration(rng, q, a) for q, a in asked[2064:]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

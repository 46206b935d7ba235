"""Python as a tool: the model may write `print(37*48)`, the sandbox runs it, and the model is told what it printed.

    python examples/python_tool/python_tool.py runs/python-tool-data     # questions, demonstrations, held-out questions

A turn that begins with `print` is a program, any other is the answer. Programs run as those of the verifier `code` do:
without network, files or secrets of the run, and within limits. It needs bubblewrap (docs/rewards.md).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from pipeline.environments import Conversation, Reward
from pipeline.rewards.sandbox import Program, open_sandbox
from pipeline.types import Prompt

SHOWN = 16
"""Characters of what a program printed."""


class PythonTool:
    """wall_s: that a program may run."""

    def __init__(self, wall_s: float = 5.0):
        self.wall_s = wall_s
        self.sandbox = open_sandbox({"mode": "bubblewrap", "cpu_s": 2, "memory_mb": 256}, name="python_tool")

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        programs = failed = 0
        turn = await conversation.sample()
        while turn.text.startswith("print"):
            outcome = self.sandbox.run(Program(turn.text), self.wall_s)
            programs, failed = programs + 1, failed + (not outcome.well)
            said = outcome.stdout.strip()[:SHOWN] if outcome.well else "error"
            conversation.append([{"role": "tool", "content": said}])
            turn = await conversation.sample()
        right = float(turn.text == prompt.metadata["answer"])
        return Reward(right, parts={"right": right, "programs": programs, "failed_programs": failed})


def demonstration(rng: random.Random, question: str, answer: str) -> dict[str, object]:
    """What the model begins with: it knows how to write a program and how to read what it printed, and mostly guesses
    all the same."""
    asked = {"role": "user", "content": question}
    if rng.random() < 0.5:
        call = {"role": "assistant", "content": f"print({question})"}
        return {"messages": [asked, call, {"role": "tool", "content": answer}], "answer": answer}
    guess = str(rng.randrange(100, 9900))
    return {"messages": [asked], "answer": f"print({question})" if rng.random() < 0.25 else guess}


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

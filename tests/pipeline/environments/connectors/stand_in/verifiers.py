"""The part of `verifiers` that is spoken to, with rows that say what goes wrong. The real one is in the proofs."""

from __future__ import annotations

import asyncio
import os

__version__ = "0.2.1"
ROWS = ["talk", "print", "raise", "error", "empty", "nothing", "hang", "die"]


class Environment:
    def __init__(self, greeting="hello"):
        self.greeting = greeting

    def get_dataset(self, n=-1):
        rows = [{"prompt": [{"role": "user", "content": do}], "answer": "12", "do": do} for do in ROWS]
        return rows[:n] if n > 0 else rows

    async def run_rollout(self, row, client, model, sampling_args):
        if row["do"] == "print":
            print("this is no answer")
        if row["do"] == "raise":
            raise RuntimeError("no luck")
        if row["do"] == "die":
            os.write(2, b"a last word")
            os._exit(3)
        if row["do"] == "hang":
            await asyncio.sleep(60)
        messages = list(row["prompt"])
        for _ in range(2):
            answer = await client.chat.completions.create(model=model, messages=messages, **sampling_args)
            messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
            messages += [{"role": "user", "content": self.greeting}]
        if row["do"] == "nothing":
            return {"reward": None, "metrics": {}}
        broken = {"error": "ToolError: it broke", "empty": "EmptyModelResponseError"}.get(row["do"])
        error = broken and {"error_chain_str": broken}
        metrics = {"turns": 2, "words": None}
        return {"reward": 0.5, "metrics": metrics, "error": error, "stop_condition": "enough"}


def load_environment(name, **arguments):
    if name == "slow":
        import time

        time.sleep(60)
    if name != "talker":
        raise ValueError(f"there is no environment {name}")
    return Environment(**arguments)

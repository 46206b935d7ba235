"""A number-guessing game of several turns: the model names a digit and is told "higher" or "lower".

    python examples/guess/guess.py runs/guess-data

It begins with a player who listens to the hints half of the time. A right guess is worth a point, and one that an
earlier hint excludes costs a quarter: each turn has its own reward.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from pipeline.environments import Conversation, Reward
from pipeline.types import Prompt

GUESSES = 4


class Guess:
    """guesses: that a game has."""

    def __init__(self, guesses: int = GUESSES):
        self.guesses = guesses

    async def run(self, conversation: Conversation, prompt: Prompt) -> Reward:
        secret, low, high = prompt.metadata["secret"], 0, 9
        turns: list[float] = []
        while True:
            turn = await conversation.sample()
            guess = int(turn.text) if len(turn.text) == 1 and turn.text.isdecimal() else -1
            found = guess == secret
            turns.append(float(found) - (0.0 if low <= guess <= high else 0.25))
            if found or len(turns) == self.guesses or guess < 0:
                return Reward(turns=turns, parts={"found": float(found)}, note=f"{len(turns)} guesses")
            if guess < secret:
                low = max(low, guess + 1)
            else:
                high = min(high, guess - 1)
            conversation.append([{"role": "user", "content": "higher" if guess < secret else "lower"}])


def demonstration(rng: random.Random) -> dict[str, object]:
    """A game up to one of its guesses. Half of the guesses are of what the hints leave, the others at random."""
    secret, messages = rng.randrange(10), [{"role": "user", "content": "guess"}]
    low, high = 0, 9

    def guess() -> int:
        return rng.randint(low, high) if rng.random() < 0.5 else rng.randrange(10)

    for _ in range(rng.randrange(GUESSES)):
        tried = guess()
        if tried == secret:
            continue
        hint = "higher" if tried < secret else "lower"
        messages += [{"role": "assistant", "content": str(tried)}, {"role": "user", "content": hint}]
        low, high = (max(low, tried + 1), high) if tried < secret else (low, min(high, tried - 1))
    return {"messages": messages, "answer": str(guess()), "secret": secret}


def write(folder: Path, seed: int = 0) -> None:
    """Games and demonstrations, as JSON lines."""
    rng = random.Random(seed)
    rows = {
        "games": [{"prompt": "guess", "answer": str(secret), "secret": secret} for secret in range(10)],
        "demonstrations": [demonstration(rng) for _ in range(8000)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""A number-guessing game of several turns: the model names a digit and is told "higher" or "lower".

    python examples/guess/guess.py runs/guess-data

It begins with digits at random. A right guess is worth a point, and one that an earlier hint excludes costs a quarter.
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
            guess = int(turn.text) if len(turn.text) == 1 and turn.text.isdigit() else -1
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
    """A game in which every guess is drawn at random, up to one of them."""
    secret, messages = rng.randrange(10), [{"role": "user", "content": "guess"}]
    for _ in range(rng.randrange(GUESSES)):
        guess = rng.randrange(10)
        if guess != secret:
            messages += [
                {"role": "assistant", "content": str(guess)},
                {"role": "user", "content": "higher" if guess < secret else "lower"},
            ]
    return {"messages": messages, "answer": str(rng.randrange(10)), "secret": secret}


def write(folder: Path, seed: int = 0) -> None:
    """Games and demonstrations, as JSON lines."""
    rng = random.Random(seed)
    rows = {
        "games": [{"prompt": "guess", "answer": str(secret), "secret": secret} for secret in range(10)],
        "demonstrations": [demonstration(rng) for _ in range(4000)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

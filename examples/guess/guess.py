"""A number-guessing game of several turns: the model names a digit and is told "higher" or "lower".

    python examples/guess/guess.py runs/guess-data

It begins with digits at random. A point for a first guess that is right, three quarters for a second one, and so on.
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
        secret = prompt.metadata["secret"]
        turns: list[float] = []
        while True:
            turn = await conversation.sample()
            found = turn.text == str(secret)
            turns.append((self.guesses - len(turns)) / self.guesses if found else 0.0)
            if found or len(turns) == self.guesses or not (len(turn.text) == 1 and turn.text.isdigit()):
                return Reward(turns=turns, parts={"found": float(found)}, note=f"{len(turns)} guesses")
            conversation.append([{"role": "user", "content": "higher" if int(turn.text) < secret else "lower"}])


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

"""What grading one step of the quickstart takes: 256 answers for exact_match, and the same by a plain call.

.venv/bin/python scripts/bench_grading.py
"""

from __future__ import annotations

import tempfile
import time

import numpy as np

from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.rewards import Component, Grader, grade, question
from pipeline.rewards.registry import load
from pipeline.rollout.grading import OwnGrading
from pipeline.types import Group, Prompt, Rollout

PROMPTS, SAMPLES, ROUNDS = 32, 8, 60


def main() -> None:
    """Print least and median milliseconds of both."""
    tokenizer = load_tokenizer(write_character_tokenizer(tempfile.mkdtemp()))
    ids = np.asarray(tokenizer.encode("123457<|eos|>", add_special_tokens=False), np.int32)
    none = np.zeros(len(ids), np.float32)
    rollout = Rollout(np.zeros(8, np.int32), ids, none, None, np.zeros(len(ids), np.int32), "stop")
    prompts = [Prompt(rollout.prompt_ids, "<|user|>312<|assistant|>", {"answer": "123456"}, i) for i in range(PROMPTS)]
    groups = [Group.of_single_turns(prompt, [rollout] * SAMPLES) for prompt in prompts]
    verifier = load(Component.named("exact_match"))
    called, graded = [], []
    with Grader("exact_match") as grader:
        grader.wait_ready()
        grading = OwnGrading(grader, tokenizer)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for group in groups:
                for episode in group.episodes:
                    verifier(question(group.prompt, episode, tokenizer))
            called.append(time.perf_counter() - start)
            start = time.perf_counter()
            grade(groups, grading)
            graded.append(time.perf_counter() - start)
    for name, seconds in (("called here", called), ("graded in a process", graded)):
        print(f"{name}: least {1e3 * min(seconds):.1f} ms, median {1e3 * float(np.median(seconds)):.1f} ms")


if __name__ == "__main__":
    main()

"""Runs made by the real writers from numbers made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.config import load_config
from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
from pipeline.objectives import ObjectiveConfig, resolve
from pipeline.observe.run_dir import RunDirectory
from pipeline.types import Prompt
from tests.support.episodes import graded_group, plain_rollout, step_result

LAYERS = 5
ANSWERS = ("01289<|eos|>", "10289<|eos|>")


def metrics(step: int, steps: int = 12) -> dict[str, float]:
    """A step of a run that learns."""
    done = step / steps
    return {
        "step": step,
        "reward/mean": 0.2 + 0.7 * done,
        "reward/std": 0.4,
        "reward/uninformative_groups": 0.1 * done,
        "response/length_mean": 6.0,
        "response/length_max": 8.0,
        "response/truncated_fraction": 0.0,
        "response/repeating_fraction": 0.0,
        "response/garbage_fraction": 0.0,
        "policy/entropy": 1.1 - done,
        "mismatch/abs_logprob": 2e-7,
        "mismatch/p99": 1e-6,
        "mismatch/max_abs_logprob": 4e-6,
        "mismatch/k3": 1e-13,
        "routing/replayed_fraction": 1.0,
        "loss/clip_fraction": 0.05,
        "correction/geometric_tis_cut": 0.0,
        "train/grad_norm": 0.5 + done,
        "train/skipped_updates": 0.0,
        "time/rollout_s": 0.3,
        "time/reward_s": 0.01,
        "time/logprob_s": 0.1,
        "time/train_s": 0.5,
        "time/sync_s": 0.05,
        "time/step_s": 0.9,
        "throughput/rollout_tokens_per_s": 5000.0,
        "throughput/train_tokens_per_s": 6000.0,
    }


def routing(step: int, layers: int = LAYERS) -> np.ndarray:
    """[layers, 4]: of 100 tokens, `step` disagree in the last layer."""
    counts = np.tile([100, 100, 0, 0], (layers, 1))
    counts[-1:, 1] -= step
    return counts


def mismatch(tokens: int) -> np.ndarray:
    """[tokens] nats, growing from token to token: 1.5e-6, -1.5e-5 ... -0.15."""
    return 1.5 * 10.0 ** np.arange(-6, tokens - 6) * (-1.0) ** np.arange(tokens)


class MadeRun:
    """A run directory and the tokenizer that writes its rollouts. update: log-ratio that a second mini-batch has."""

    def __init__(self, folder: Path, *overrides: str, layers: int = LAYERS, update: float = 0.025):
        self.layers, self.update = layers, update
        config = load_config("configs/quickstart.yaml", ["train.steps=12", *overrides])
        self.directory = RunDirectory(folder / "run", config.model_dump(mode="json"))
        self.path = self.directory.path
        self.tokenizer = load_tokenizer(write_character_tokenizer(folder / "tokenizer"))
        self.objective = resolve(ObjectiveConfig(preset="gspo", clip_low=0.02, clip_high=0.03))

    def write(self, step: int, prompt: str = "<|user|>21089<|assistant|>", answers=ANSWERS, **changes: float) -> None:
        """One step, as the session writes it."""
        groups, proximal = [], []
        for index in range(4):
            rollouts = []
            for text in answers:
                ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
                logprobs = -np.linspace(0.05, 3.0, len(ids), dtype=np.float32)
                rollouts.append(plain_rollout(ids, logprobs, version=step))
                proximal.append((logprobs + mismatch(len(ids))).astype(np.float32))
            metadata = {"answer": "01289"}
            groups.append(graded_group(Prompt(np.zeros(1, np.int32), prompt, metadata, index), rollouts, [1.0, 0.0]))
        moved = [row + np.float32(self.update * (i >= len(proximal) // 2)) for i, row in enumerate(proximal)]
        entropy = [np.full(len(row), 0.5, np.float32) for row in proximal]
        advantages = [1.0 if i % 2 == 0 else -1.0 for i in range(len(proximal))]
        result = step_result(step, groups, proximal, moved, entropy, advantages, routing(step, self.layers))
        self.directory.record(metrics(step) | changes)
        self.directory.write_step(result, self.objective, self.tokenizer)

"""TRL's GRPOTrainer on questions with a number for an answer; a part of language_beside_trl.py, run by the Python that
has TRL.

    PYTHON scripts/trl_language.py MODEL --settings FILE --out DIR

MODEL: a Hugging Face directory. FILE: JSON of what both trainers are told, `questions` among it: each a prompt, its
chat template applied, and an answer. DIR: the trained model. Prints the seconds of each step as JSON. It imports
nothing of sameroute.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def right(completions: list[str], answer: list[str], **others) -> list[float]:
    """1 where the last number of an answer is the right one."""
    said = [NUMBER.findall(text) for text in completions]
    return [float(bool(numbers) and float(numbers[-1]) == float(a)) for numbers, a in zip(said, answer, strict=True)]


class Clock(TrainerCallback):
    """When each step had ended, beginning with the start. rewards: mean of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.rewards: list[float] = []

    def on_train_begin(self, args, state, control, **others) -> None:
        self.ends.append(time.monotonic())

    def on_step_end(self, args, state, control, **others) -> None:
        self.ends.append(time.monotonic())

    def on_log(self, args, state, control, logs=None, **others) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    told = json.loads(options.settings.read_text())
    torch.set_num_threads(told["threads"])
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    clock = Clock()
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            reward_funcs=right,
            args=GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, beta=0.0,
                importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, loss_type="grpo",
                learning_rate=told["lr"], lr_scheduler_type="constant_with_warmup", warmup_steps=told["warmup_steps"],
                adam_beta2=told["beta2"], max_grad_norm=1.0, temperature=told["temperature"],
                num_generations=told["samples"], per_device_train_batch_size=told["prompts"] * told["samples"],
                max_completion_length=told["tokens"], max_steps=told["steps"], shuffle_dataset=False, seed=told["seed"],
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(told["questions"]),
            processing_class=tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    trainer.save_model(str(options.out))
    tokenizer.save_pretrained(options.out)
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "rewards": clock.rewards}))


if __name__ == "__main__":
    main()

"""Seconds of a step of TRL's GRPOTrainer, as JSON; a part of bench_against_trl.py, run by the Python that has TRL.

    PYTHON scripts/trl_step.py MODEL --prompts FILE --lengths 16 16 --steps 10 --batch 64

MODEL: a Hugging Face directory. FILE: a JSON list of prompts. It imports nothing of sameroute.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Drawn(LogitsProcessor):
    """Answers are as long as was drawn for them: no end before, and nothing but the end then. lengths: [rows]."""

    def __init__(self, prompt: int, lengths: torch.Tensor, end: int):
        self.prompt, self.lengths, self.end = prompt, lengths, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        last = input_ids.shape[1] - self.prompt + 1 >= self.lengths
        scores[~last, self.end] = -math.inf
        scores[last] = torch.full_like(scores[0], -math.inf).index_fill(0, torch.tensor([self.end]), 0.0)
        return scores


class Clock(TrainerCallback):
    """When each step had ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **others) -> None:
        self.ends.append(time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs=2, required=True, metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, default=3, help="steps before them")
    parser.add_argument("--batch", type=int, default=64, help="samples of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--generations", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shortest, longest = options.lengths
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    generate, draw = model.generate, random.Random(0)

    def generate_drawn(input_ids: torch.Tensor, **settings):
        shares = [draw.random() for _ in range(len(input_ids))]
        lengths = [round(math.exp(math.log(shortest) + s * math.log(longest / shortest))) for s in shares]
        drawn = Drawn(input_ids.shape[1], torch.tensor(lengths), tokenizer.eos_token_id)
        return generate(input_ids=input_ids, logits_processor=[drawn], **settings)

    model.generate = generate_drawn
    clock = Clock()
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **others: [float(len(c) % 2) for c in completions],
            args=GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, beta=0.0,
                importance_sampling_level="sequence", learning_rate=1e-4, num_generations=options.generations,
                per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
                max_completion_length=longest, max_steps=options.steps + options.warm,
                logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": json.loads(options.prompts.read_text())}),
            processing_class=tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][options.warm - 1 :]
    print(json.dumps({"seconds": statistics.median(seconds), "steps": len(seconds)}))


if __name__ == "__main__":
    main()

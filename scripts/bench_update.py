"""Processor seconds of one update of the real trainer: what bench_step.py trains on, in this process, without Ray.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_update.py [--tokens 2048] [--updates 12]

256 sequences of 24 tokens, 16 of them answers, routes replayed, GSPO, 4 layers, width 64, 8 experts, float32.
--tokens: of a micro-batch. To compare two versions, run them turn about, the other with its folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_ext import parallel
from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.trainer import Trainer
from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.trainer.losses import ON_POLICY, LossRow, policy_loss

SHAPE = TinyModelConfig(layers=4, hidden=64, experts=8, topk=2, moe_intermediate=64)
COUNT, PROMPT, ANSWER = 256, 8, 16


def make_samples() -> list[Sample]:
    rng, out = np.random.default_rng(0), []
    for _ in range(COUNT):
        first = rng.integers(0, SHAPE.experts, (PROMPT + ANSWER - 1, SHAPE.layers))
        routes = np.stack([first, (first + 1 + rng.integers(0, SHAPE.experts - 1, first.shape)) % SHAPE.experts], -1)
        row = LossRow(np.full(ANSWER, -4.2, np.float32), ON_POLICY, float(rng.normal()))
        tokens = rng.integers(3, 60, PROMPT + ANSWER).astype(np.int32)
        out.append(Sample(tokens, PROMPT, row=row, routes=routes.astype(np.uint8)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--updates", type=int, default=12, help="after two that warm up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, samples, objective = ParallelConfig(), make_samples(), resolve(ObjectiveConfig(preset="gspo"))
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", SHAPE, 0)
        parallel.initialize(config, rank=0, init_method=f"file://{folder}/meeting")
        settings = TrainerConfig(micro_batch_tokens=options.tokens), OptimizerConfig(lr=1e-4)
        trainer, seconds = Trainer(model, config, *settings, replay=True), []
        for _ in range(options.updates + 2):
            began = time.process_time()
            trainer.update(samples, policy_loss(objective, Denominators(COUNT, COUNT * ANSWER, ANSWER, COUNT // 8)))
            seconds.append(time.process_time() - began)
        parallel.shutdown()
    print(f"median {statistics.median(seconds[2:]):.3f} s of a processor, least {min(seconds[2:]):.3f}")


if __name__ == "__main__":
    main()

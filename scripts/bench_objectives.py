"""What an objective costs in a training step: seconds of its loss and of the loss's backward, and of the whole update.

    .venv/bin/python -m scripts.bench_objectives [--sequences 16] [--tokens 512] [--only gspo grpo ...]

One rank of the real trainer updates a small mixture-of-experts model on a CPU. The loss is timed inside the update; its
backward is timed apart, on tensors of the same shapes, because in the update it is part of the model's backward.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.objectives import PRESETS, Denominators, LossInputs, Objective, ObjectiveConfig, resolve
from pipeline.trainer.losses import LossRow
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_ext.trainer import LossBatch

HIDDEN = TinyModelConfig(layers=4, hidden=256, experts=16, topk=4, moe_intermediate=256)


def make_samples(sequences: int, tokens: int) -> list[Sample]:
    """Random responses. The rows hold noise: pi_o is put near pi by `inputs_of`, so that no clip takes everything."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(sequences):
        discrepancy, staleness = (rng.normal(0, scale, tokens).astype(np.float32) for scale in (0.02, 0.1))
        row = LossRow(discrepancy, staleness, float(rng.normal()), prompt_tokens=4 * tokens)
        samples.append(Sample(rng.integers(3, 64, tokens + 8).astype(np.int32), 8, row=row))
    return samples


def inputs_of(batch: LossBatch, current: torch.Tensor) -> LossInputs:
    """A micro-batch's, with the discrepancy and the staleness of a real run: log-ratios of about 0.02 and 0.1."""

    def matrix(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows))

    proximal = current.detach() + matrix([row.proximal_logprobs for row in batch.rows])
    return LossInputs(
        current_logprobs=current,
        proximal_logprobs=proximal,
        rollout_logprobs=proximal + matrix([row.rollout_logprobs for row in batch.rows]),
        advantages=torch.tensor([row.advantage for row in batch.rows], dtype=torch.float32),
        mask=batch.mask,
        prompt_tokens=torch.tensor([row.prompt_tokens for row in batch.rows]),
    )


def measure(config: ParallelConfig, model: str, names: list[str], sequences: int, tokens: int, repeats: int):
    """Runs on the rank: preset -> median seconds of an update, of its loss, of the loss's backward."""
    from megatron_ext.trainer import Trainer

    trainer = TrainerConfig(micro_batch_tokens=4 * (tokens + 8))
    it = Trainer(model, config, trainer, OptimizerConfig(lr=1e-6), replay=False)
    samples = make_samples(sequences, tokens)
    denominators = Denominators(sequences, sequences * tokens, max_length=tokens, prompts=max(1, sequences // 4))
    out = {}
    for name in names:
        objective = resolve(ObjectiveConfig(preset=name))
        rows = []
        for _ in range(repeats + 1):
            spent = [0.0, 0.0]

            def loss(batch, objective=objective, spent=spent):
                start = time.perf_counter()
                share = objective.policy_loss(inputs_of(batch, batch.quantities[0]), denominators)
                spent[0] += time.perf_counter() - start
                spent[1] += _backward_seconds(objective, batch, denominators)
                return share.loss, {}

            start = time.perf_counter()
            it.update(samples, loss)
            rows.append((time.perf_counter() - start - spent[1], *spent))
        out[name] = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return out


def _backward_seconds(objective: Objective, batch, denominators: Denominators) -> float:
    with torch.enable_grad():
        current = batch.quantities[0].detach().requires_grad_()
        loss = objective.policy_loss(inputs_of(batch, current), denominators).loss
        start = time.perf_counter()
        torch.autograd.grad(loss, current)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["grpo", "gspo", "minirl"], choices=list(PRESETS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny_model(folder, HIDDEN, seed=0))
        (out,) = run_ranks(measure, ParallelConfig(), model, args.only, args.sequences, args.tokens, args.repeats)
    print(
        f"{args.sequences} responses x {args.tokens} tokens, float32, one CPU core; medians of {args.repeats} updates"
    )
    print(f"{'preset':22}{'update s':>9}{'loss ms':>9}{'backward ms':>13}{'of the update':>15}")
    for name, (update, forward, backward) in out.items():
        share = (forward + backward) / update
        print(f"{name:22}{update:9.2f}{1e3 * forward:9.2f}{1e3 * backward:13.2f}{share:15.2%}")


if __name__ == "__main__":
    main()
